"""Maintenance windows as people spell them: "mon-fri 22:00 8h Europe/Berlin". No IO."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ebbflow.cli import quantities, values
from ebbflow.common.errors import EbbflowError, Reason

ALWAYS = "always"
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_S, _WEEK_S = 86_400, 7 * 86_400
_START = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d")
_SPAN = re.compile(r"(\d\d:\d\d)-((?:[01]\d|2[0-3]):[0-5]\d|24:00)")
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*")


@dataclass(frozen=True, kw_only=True)
class Window:
    """One weekly window."""

    weekdays: tuple[int, ...] = ()
    """Days on which it opens, 1 for Monday to 7 for Sunday, rising; empty means every day."""
    start: str
    """When it opens, "HH:MM"."""
    duration_s: float
    """How long it stays open."""
    time_zone: str = ""
    """Time zone of `start`; empty means UTC."""


_OPEN = Window(start="00:00", duration_s=_DAY_S)


def read(text: str) -> Window:
    """Reads a window: days (every day if left out), when it opens, for how long, time zone (UTC if left out).

    When and how long may also be one word, "22:00-06:00".

    Raises:
        EbbflowError: INVALID_REQUEST if it is none.
    """
    words = text.split()
    if words == [ALWAYS]:
        return _OPEN
    weekdays = () if words and words[0][0].isdigit() else _days(words.pop(0) if words else "", text)
    if words and (span := _SPAN.fullmatch(words[0])):
        words[:1] = [span[1], f"{_minutes_between(span[1], span[2])}m"]
    if len(words) not in {2, 3} or not _START.fullmatch(words[0]):
        raise _wrong(text)
    duration_s = round(values.seconds(words[1]), 3)
    if not 0 < duration_s <= _WEEK_S:
        raise _wrong(text)
    zone = words[2] if words[2:] else ""
    if zone and not _ZONE.fullmatch(zone):
        raise _wrong(text)
    return Window(weekdays=weekdays, start=words[0], duration_s=duration_s, time_zone="" if zone == "UTC" else zone)


def write(window: Window) -> str:
    """Returns a text that `read` reads as the same window."""
    if window == _OPEN:
        return ALWAYS
    days = [_runs(window.weekdays)] if window.weekdays else []
    return " ".join([*days, window.start, quantities.duration(window.duration_s), window.time_zone or "UTC"])


def to_proto(window: Window) -> Any:
    """Returns the message."""
    from google.protobuf.duration_pb2 import Duration

    from ebbflow.api.v1.rollout_pb2 import MaintenanceWindow

    length = Duration()
    length.FromMilliseconds(round(window.duration_s * 1000))
    return MaintenanceWindow(weekdays=window.weekdays, start=window.start, duration=length, time_zone=window.time_zone)


def of_proto(message: Any) -> Window:
    """Returns the window of a message."""
    return Window(
        weekdays=tuple(sorted(set(message.weekdays))),
        start=message.start,
        duration_s=message.duration.ToMilliseconds() / 1000,
        time_zone=message.time_zone,
    )


def listed(messages: Iterable[Any]) -> str:
    """Returns windows as one text: "mon-fri 22:00 8h UTC; sat 00:00 1d UTC", or "always" if there are none."""
    return "; ".join(write(of_proto(message)) for message in messages) or ALWAYS


def _minutes_between(begin: str, end: str) -> int:
    """Minutes from one time of day to the next time that it is the other."""
    first, last = (int(time[:2]) * 60 + int(time[3:]) for time in (begin, end))
    return (last - first - 1) % (24 * 60) + 1


def _days(text: str, whole: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.lower().split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS or bool(dash) != bool(last):
            raise _wrong(whole)
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found |= {(begin + step) % 7 + 1 for step in range((end - begin) % 7 + 1)}
    return tuple(sorted(found))


def _runs(weekdays: Iterable[int]) -> str:
    """Days with neighbours drawn together: "mon-fri,sun"."""
    runs: list[list[int]] = []
    for day in sorted(weekdays):
        if runs and day == runs[-1][-1] + 1:
            runs[-1].append(day)
        else:
            runs.append([day])
    return ",".join(DAYS[run[0] - 1] + (f"-{DAYS[run[-1] - 1]}" if run[1:] else "") for run in runs)


def _wrong(text: str) -> EbbflowError:
    message = f'{text!r} is no window such as "mon-fri 22:00 8h Europe/Berlin", "sat,sun 00:00 1d" or "always"'
    return EbbflowError(Reason.INVALID_REQUEST, message, field="window")
