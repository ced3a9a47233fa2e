"""Maintenance windows: weekly, by the wall clock of a time zone. Decisions without IO.

A window opens at a time of day and stays open for a length of real time, so that a change of clocks neither shortens
nor doubles it. A time of day that a change skips is read by the offset before it, one that comes twice as its first
occurrence (RFC 5545, 3.3.5).
"""

import datetime as dt
import functools
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass

from ebbflow.common.errors import EbbflowError, Reason

MAX_WINDOWS = 16
MAX_DURATION = dt.timedelta(days=7)
_LOOK_DAYS = 9
"""A weekly window opens within so many days, and one that is open has opened within them."""
_SUNDAY = 7


@dataclass(frozen=True, kw_only=True)
class Window:
    """One weekly window."""

    weekdays: tuple[int, ...] = ()
    """Days on which it opens, 1 for Monday to 7 for Sunday; none means every day."""
    start: str = "00:00"
    """Time of day at which it opens, "HH:MM"."""
    duration: dt.timedelta = dt.timedelta(days=1)
    """How long it stays open."""
    time_zone: str = ""
    """Time zone of `start`, such as "Europe/Berlin"; empty means UTC."""


@dataclass(frozen=True)
class Span:
    """A stretch of time during which devices may be told: windows that touch, joined."""

    opening: dt.datetime
    close: dt.datetime
    """First moment at which it is shut again."""


ALWAYS = Span(dt.datetime.min.replace(tzinfo=dt.UTC), dt.datetime.max.replace(tzinfo=dt.UTC))


def check(windows: Sequence[Window], field: str = "windows") -> None:
    """Refuses windows that make no sense.

    Raises:
        EbbflowError: INVALID_REQUEST naming the window and its field.
    """
    if len(windows) > MAX_WINDOWS:
        raise _wrong(field, f"has {len(windows)} windows, at most {MAX_WINDOWS} can be kept to")
    for index, window in enumerate(windows):
        path = f"{field}[{index}]"
        if not all(1 <= day <= _SUNDAY for day in window.weekdays):
            raise _wrong(f"{path}.weekdays", "has a day outside 1 (Monday) to 7 (Sunday)")
        if not dt.timedelta(0) < window.duration <= MAX_DURATION:
            raise _wrong(f"{path}.duration", "must be above 0 and at most 7 days")
        try:
            _time_of_day(window.start)
        except ValueError:
            raise _wrong(f"{path}.start", 'is no time of day such as "22:30"') from None
        try:
            _zone(window.time_zone)
        except (OSError, ValueError, LookupError):
            raise _wrong(f"{path}.time_zone", 'is no time zone known here, such as "Europe/Berlin"') from None


def span(windows: tuple[Window, ...], now: dt.datetime) -> Span | None:
    """The open stretch that holds `now`, or None if the windows are shut; without windows it is always open."""
    if not windows:
        return ALWAYS
    return next((found for found in _spans(windows, now.date()) if found.opening <= now < found.close), None)


def is_open(windows: tuple[Window, ...], now: dt.datetime) -> bool:
    """Whether devices may be told at an aware time `now`."""
    return span(windows, now) is not None


def next_open(windows: tuple[Window, ...], now: dt.datetime) -> dt.datetime:
    """`now` if the windows are open, otherwise when the next one opens."""
    if is_open(windows, now):
        return now
    return next(found.opening for found in _spans(windows, now.date()) if found.opening > now)


def next_change(windows: tuple[Window, ...], now: dt.datetime) -> dt.datetime | None:
    """When the windows open or close next; None if there are none."""
    if not windows:
        return None
    found = span(windows, now)
    return found.close if found else next_open(windows, now)


@functools.lru_cache(maxsize=256)
def _spans(windows: tuple[Window, ...], day: dt.date) -> tuple[Span, ...]:
    """Open stretches around a UTC day, in order, joined where they touch."""
    found: list[Span] = []
    for opening, close in sorted(_openings(windows, day)):
        if found and opening <= found[-1].close:
            found[-1] = Span(found[-1].opening, max(close, found[-1].close))
        else:
            found.append(Span(opening, close))
    return tuple(found)


def _openings(windows: tuple[Window, ...], day: dt.date) -> list[tuple[dt.datetime, dt.datetime]]:
    found = []
    for window in windows:
        time, zone = _time_of_day(window.start), _zone(window.time_zone)
        for offset in range(-_LOOK_DAYS, _LOOK_DAYS + 1):
            local = day + dt.timedelta(days=offset)
            if not window.weekdays or local.isoweekday() in window.weekdays:
                opening = dt.datetime.combine(local, time, zone).astimezone(dt.UTC)
                found.append((opening, opening + window.duration))
    return found


def _time_of_day(text: str) -> dt.time:
    if len(text) != len("HH:MM"):
        raise ValueError(text)
    return dt.datetime.strptime(text, "%H:%M").time()  # noqa: DTZ007 - a time of day has no zone


def _zone(name: str) -> dt.tzinfo:
    return zoneinfo.ZoneInfo(name) if name else dt.UTC


def _wrong(field: str, problem: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, f"{field} {problem}", field=field)
