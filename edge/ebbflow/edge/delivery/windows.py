"""When weights may be fetched: weekly windows of wall-clock time. No clock in here.

    mon-fri 22:00-06:00     begins on each of these days, ends on the next morning
    sat,sun 00:00-24:00     the whole day
    01:30-04:00             every day

Times that a clock change skips or repeats are read as RFC 5545 does (3.3.5): a skipped one by the offset before the
change, a repeated one as its first occurrence.
"""

import datetime as dt
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(r"(?:(?P<days>[a-z,-]+) +)?(?P<begin>[0-9]{2}:[0-9]{2})-(?P<end>[0-9]{2}:[0-9]{2})")
_DAY_MINUTES = 24 * 60
_LOOK_DAYS = 16
"""A window that opens once a week opens within these, also when a clock change swallows it once."""


@dataclass(frozen=True)
class Window:
    """One stretch of time on some days of the week."""

    days: frozenset[int]
    """Days on which it begins; Monday is 0."""
    begin_minutes: int
    """After midnight."""
    end_minutes: int
    """After the same midnight; more than a day's if it ends on the next morning."""

    @classmethod
    def parse(cls, text: str) -> "Window":
        """Reads a window.

        Raises:
            ValueError: saying what a window looks like.
        """
        match = _WINDOW.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(f'{text[:40]!r} is no window such as "mon-fri 22:00-06:00" or "01:30-04:00"')
        begin, end = _minutes(match["begin"]), _minutes(match["end"])
        if begin in {end, _DAY_MINUTES}:
            raise ValueError(f'{text[:40]!r} has no length; the whole day is "00:00-24:00"')
        days = _days(match["days"]) if match["days"] else frozenset(range(7))
        return cls(days, begin, end if end > begin else end + _DAY_MINUTES)


@dataclass(frozen=True)
class Windows:
    """All windows of a device; without any, every time is inside."""

    windows: tuple[Window, ...] = ()
    zone: dt.tzinfo = dt.UTC

    def is_open(self, now: dt.datetime) -> bool:
        """Whether `now` (aware) is inside a window."""
        return not self.windows or any(begin <= now < end for begin, end in self._spans(now))

    def next_open(self, now: dt.datetime) -> dt.datetime | None:
        """`now` if it is inside a window, else when the next one opens; None if there is none."""
        if self.is_open(now):
            return now
        return min((begin for begin, _ in self._spans(now) if begin > now), default=None)

    def next_close(self, now: dt.datetime) -> dt.datetime | None:
        """When the windows that hold `now` end, joined where they touch; None if outside, or not within a week."""
        if not self.windows:
            return None
        close = None
        for begin, end in sorted(self._spans(now)):
            if begin <= (close or now) < end:
                close = end
        return close if close is None or close < now + dt.timedelta(days=_LOOK_DAYS - 2) else None

    def _spans(self, now: dt.datetime) -> Iterable[tuple[dt.datetime, dt.datetime]]:
        """Begin and end of every window around `now`, in UTC."""
        today = now.astimezone(self.zone).date()
        for offset in range(-2, _LOOK_DAYS):
            day = today + dt.timedelta(days=offset)
            for window in self.windows:
                if day.weekday() in window.days:
                    begin, end = (self._instant(day, at) for at in (window.begin_minutes, window.end_minutes))
                    if begin < end:
                        yield begin, end

    def _instant(self, day: dt.date, minutes: int) -> dt.datetime:
        days, rest = divmod(minutes, _DAY_MINUTES)
        wall = dt.datetime.combine(day + dt.timedelta(days=days), dt.time(rest // 60, rest % 60), self.zone)
        return wall.astimezone(dt.UTC)


def parse_zone(name: str) -> dt.tzinfo:
    """Returns the time zone of a name such as "Europe/Berlin".

    Raises:
        ValueError: if this device does not know it.
    """
    if name == "UTC":
        return dt.UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError):
        raise ValueError(
            f"{name[:40]!r} is no time zone that this device knows, such as Europe/Berlin; it may lack tzdata"
        ) from None


def parse_windows(texts: Sequence[str], zone: str) -> Windows:
    """Reads all windows of a device.

    Raises:
        ValueError: naming the one that is wrong.
    """
    return Windows(tuple(Window.parse(text) for text in texts), parse_zone(zone))


def _minutes(text: str) -> int:
    hours, minutes = int(text[:2]), int(text[3:])
    total = hours * 60 + minutes
    if minutes >= 60 or total > _DAY_MINUTES:  # noqa: PLR2004 - minutes of an hour
        raise ValueError(f"{text} is no time of the day")
    return total


def _days(text: str) -> frozenset[int]:
    days: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS or part.count("-") > 1 or part.endswith("-"):
            raise ValueError(f"{part!r} is no day or range of days out of {', '.join(DAYS)}")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days.update((begin + offset) % 7 for offset in range((end - begin) % 7 + 1))
    return frozenset(days)
