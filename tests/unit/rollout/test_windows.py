"""Maintenance windows: by example around changes of clocks, and against a reading of the wall clock by hand."""

import datetime as dt
import zoneinfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.cloud.rollout import windows, wire
from ebbflow.cloud.rollout.windows import Window
from ebbflow.common.errors import EbbflowError, Reason

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
HOUR = dt.timedelta(hours=1)
SECOND = dt.timedelta(seconds=1)


def berlin(*when: int) -> dt.datetime:
    return dt.datetime(*when, tzinfo=BERLIN).astimezone(dt.UTC)  # type: ignore[misc,arg-type]


def test_without_windows_it_is_always_open() -> None:
    now = berlin(2026, 11, 1)
    assert windows.is_open((), now)
    assert windows.next_open((), now) == now
    assert windows.next_change((), now) is None


def test_a_window_opens_on_its_days_only_and_may_last_over_midnight() -> None:
    friday = (Window(weekdays=(5,), start="22:00", duration=8 * HOUR, time_zone="Europe/Berlin"),)
    opening = berlin(2026, 11, 6, 22)
    assert not windows.is_open(friday, opening - dt.timedelta(microseconds=1))
    assert windows.is_open(friday, opening)
    assert windows.is_open(friday, opening + 8 * HOUR - dt.timedelta(microseconds=1))
    assert not windows.is_open(friday, opening + 8 * HOUR)
    assert windows.next_open(friday, opening + 8 * HOUR) == berlin(2026, 11, 13, 22)
    assert windows.next_change(friday, opening) == opening + 8 * HOUR


def test_windows_that_touch_are_one() -> None:
    both = Window(start="01:00", duration=2 * HOUR), Window(start="03:00", duration=HOUR)
    now = dt.datetime(2026, 11, 1, 2, tzinfo=dt.UTC)
    assert windows.span(both, now) == windows.Span(now - HOUR, now + 2 * HOUR)


def test_every_day_around_the_clock_never_shuts() -> None:
    always = (Window(time_zone="Europe/Berlin"),)
    begin = berlin(2026, 3, 27)
    assert all(windows.is_open(always, begin + minute * dt.timedelta(minutes=30)) for minute in range(48 * 5))


@pytest.mark.parametrize(
    ("start", "day", "opening_utc"),
    [
        ("02:30", (2026, 3, 29), dt.datetime(2026, 3, 29, 1, 30, tzinfo=dt.UTC)),  # skipped: the offset before it
        ("02:30", (2026, 10, 25), dt.datetime(2026, 10, 25, 0, 30, tzinfo=dt.UTC)),  # twice: the first
        ("03:30", (2026, 3, 29), dt.datetime(2026, 3, 29, 1, 30, tzinfo=dt.UTC)),
    ],
)
def test_a_change_of_clocks_opens_a_window_once_and_for_its_whole_length(
    start: str, day: tuple[int, int, int], opening_utc: dt.datetime
) -> None:
    nightly = (Window(start=start, duration=2 * HOUR, time_zone="Europe/Berlin"),)
    midnight = berlin(*day)
    minutes = [midnight + minute * dt.timedelta(minutes=1) for minute in range(24 * 60)]
    open_minutes = [minute for minute in minutes if windows.is_open(nightly, minute)]
    assert open_minutes[0] == opening_utc
    assert len(open_minutes) == 120


@pytest.mark.parametrize(
    ("window", "field"),
    [
        (Window(weekdays=(0,)), "windows[0].weekdays"),
        (Window(weekdays=(8,)), "windows[0].weekdays"),
        (Window(start="24:00"), "windows[0].start"),
        (Window(start="7:00"), "windows[0].start"),
        (Window(start=""), "windows[0].start"),
        (Window(duration=dt.timedelta(0)), "windows[0].duration"),
        (Window(duration=dt.timedelta(days=7, seconds=1)), "windows[0].duration"),
        (Window(time_zone="Atlantis/Capital"), "windows[0].time_zone"),
        (Window(time_zone="../etc/passwd"), "windows[0].time_zone"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused_by_name(window: Window, field: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        windows.check((window,))
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_REQUEST, field)


def test_there_are_not_more_windows_than_can_be_kept_to() -> None:
    with pytest.raises(EbbflowError) as caught:
        windows.check((Window(),) * (windows.MAX_WINDOWS + 1))
    assert caught.value.metadata["field"] == "windows"


some_windows = st.lists(
    st.builds(
        Window,
        weekdays=st.sets(st.integers(1, 7)).map(lambda days: tuple(sorted(days))),
        start=st.builds("{:02d}:{:02d}".format, st.integers(0, 23), st.integers(0, 59)),
        duration=st.integers(1, 7 * 24 * 60).map(lambda minutes: dt.timedelta(minutes=minutes)),
        time_zone=st.sampled_from(["", "Europe/Berlin", "America/St_Johns", "Pacific/Apia", "Australia/Lord_Howe"]),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
times = st.integers(0, 5 * 365 * 86_400).map(lambda seconds: dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + seconds * SECOND)


def by_hand(window: Window, now: dt.datetime) -> bool:
    """Whether a window is open, read straight from the definition."""
    zone = zoneinfo.ZoneInfo(window.time_zone) if window.time_zone else dt.UTC
    hour, minute = map(int, window.start.split(":"))
    for back in range(-2, 10):
        day = (now - dt.timedelta(days=back)).date()
        if window.weekdays and day.isoweekday() not in window.weekdays:
            continue
        opening = dt.datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone).astimezone(dt.UTC)
        if opening <= now < opening + window.duration:
            return True
    return False


@settings(max_examples=500)
@given(chosen=some_windows, now=times)
def test_windows_are_open_when_their_definition_says_so(chosen: tuple[Window, ...], now: dt.datetime) -> None:
    windows.check(chosen)
    assert windows.is_open(chosen, now) == any(by_hand(window, now) for window in chosen)


@settings(max_examples=300)
@given(chosen=some_windows, now=times)
def test_the_next_change_is_the_next_change(chosen: tuple[Window, ...], now: dt.datetime) -> None:
    opens, changes = windows.next_open(chosen, now), windows.next_change(chosen, now)
    tick = dt.timedelta(microseconds=1)
    assert changes is not None
    assert now <= opens
    assert windows.is_open(chosen, opens)
    assert opens == now or not windows.is_open(chosen, opens - tick)
    if changes - now < dt.timedelta(days=8):  # one that never shuts has no change to look at
        assert windows.is_open(chosen, changes) != windows.is_open(chosen, now)
        assert windows.is_open(chosen, changes - tick) == windows.is_open(chosen, now)


@given(chosen=some_windows)
def test_the_registry_keeps_windows_as_they_are(chosen: tuple[Window, ...]) -> None:
    assert tuple(wire.window_from_json(wire.window_to_json(window)) for window in chosen) == chosen
