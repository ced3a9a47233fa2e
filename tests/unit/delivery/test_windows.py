"""Transfer windows: how they are written, midnight, weeks, and clocks that change."""

import contextlib
import datetime as dt
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ebbflow.edge.delivery.windows import DAYS, Window, Windows, parse_windows, parse_zone

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "Pacific/Apia"]
MINUTE = dt.timedelta(minutes=1)


def at(text: str, zone: dt.tzinfo = dt.UTC) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=zone)


def clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


@st.composite
def texts(draw: st.DrawFn) -> str:
    begin = draw(st.integers(0, 1439))
    end = draw(st.integers(0, 1440).filter(lambda end: end != begin))
    days = draw(st.lists(st.sampled_from(DAYS), max_size=3))
    parts = [draw(st.sampled_from([day, f"{day}-{draw(st.sampled_from(DAYS))}"])) for day in days]
    return f"{','.join(parts)} {clock(begin)}-{clock(end)}".strip()


INSTANTS = st.integers(1_704_067_200, 1_830_297_600).map(lambda second: dt.datetime.fromtimestamp(second, dt.UTC))
WINDOWS = st.builds(parse_windows, st.lists(texts(), min_size=1, max_size=3), st.sampled_from(ZONES))


@pytest.mark.parametrize(
    ("text", "days", "begin", "end"),
    [
        ("mon-fri 22:00-06:00", {0, 1, 2, 3, 4}, 1320, 1800),
        ("sat,sun 00:00-24:00", {5, 6}, 0, 1440),
        ("01:30-04:00", set(range(7)), 90, 240),
        ("fri-mon 10:00-11:00", {4, 5, 6, 0}, 600, 660),
        ("Wed 00:00-00:01", {2}, 0, 1),
    ],
)
def test_a_window_is_days_and_two_times(text: str, days: set[int], begin: int, end: int) -> None:
    assert Window.parse(text) == Window(frozenset(days), begin, end)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mon",
        "22:00",
        "22:00-22:00",
        "24:00-01:00",
        "25:00-26:00",
        "10:60-11:00",
        "1:00-2:00",
        "mon- 10:00-11:00",
        "mo 10:00-11:00",
        "mon,,tue 10:00-11:00",
        "mon-tue-wed 10:00-11:00",
        "10:00-24:01",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no|has no"):
        Window.parse(text)


@given(st.text(max_size=30))
def test_no_text_makes_the_parser_fail_in_another_way(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert Window.parse(text).end_minutes > Window.parse(text).begin_minutes


@pytest.mark.parametrize("name", ["Nowhere/Land", "../../etc/passwd", "", "Europe", "\0"])
def test_a_zone_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="is no time zone"):
        parse_zone(name)


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    windows = parse_windows(["fri 22:00-06:00"], "Europe/Berlin")
    assert not windows.is_open(at("2026-11-20T21:59", BERLIN))  # a Friday
    assert windows.is_open(at("2026-11-20T22:00", BERLIN))
    assert windows.is_open(at("2026-11-21T05:59", BERLIN))
    assert not windows.is_open(at("2026-11-21T06:00", BERLIN))
    assert not windows.is_open(at("2026-11-21T22:00", BERLIN))
    assert windows.next_open(at("2026-11-21T06:00", BERLIN)) == at("2026-11-27T22:00", BERLIN)
    assert windows.next_close(at("2026-11-20T23:00", BERLIN)) == at("2026-11-21T06:00", BERLIN)


def test_windows_that_touch_are_one() -> None:
    windows = parse_windows(["sat 20:00-24:00", "sun 00:00-03:00"], "UTC")
    assert windows.next_close(at("2026-11-21T21:00")) == at("2026-11-22T03:00")


def test_without_windows_and_within_windows_without_end_it_is_always_open() -> None:
    for windows in (Windows(), parse_windows(["00:00-24:00"], "Europe/Berlin")):
        assert windows.is_open(at("2026-03-29T02:30"))
        assert windows.next_close(at("2026-03-29T02:30")) is None


@pytest.mark.parametrize(
    ("text", "begin", "end"),
    [
        # The clock goes from 02:00 to 03:00 on 29 March 2026.
        ("01:00-02:30", "2026-03-29T00:00", "2026-03-29T01:30"),
        ("02:30-04:00", "2026-03-29T01:30", "2026-03-29T02:00"),
        ("22:00-06:00", "2026-03-28T21:00", "2026-03-29T04:00"),
        # And from 03:00 back to 02:00 on 25 October 2026.
        ("02:30-04:00", "2026-10-25T00:30", "2026-10-25T03:00"),
        ("01:00-02:30", "2026-10-24T23:00", "2026-10-25T00:30"),
        ("22:00-06:00", "2026-10-24T20:00", "2026-10-25T05:00"),
    ],
)
def test_changes_of_the_clock(text: str, begin: str, end: str) -> None:
    windows = parse_windows([text], "Europe/Berlin")
    assert windows.next_open(at(begin) - MINUTE) == at(begin)
    assert windows.next_close(at(begin)) == at(end)
    assert not windows.is_open(at(end))


def test_a_window_that_the_clock_skips_opens_on_the_next_day() -> None:
    windows = parse_windows(["02:30-03:15"], "Europe/Berlin")  # skipped to 03:30, after its own end
    assert windows.next_open(at("2026-03-29T00:00")) == at("2026-03-30T00:30")


@given(WINDOWS, INSTANTS)
def test_the_next_opening_is_open_and_nothing_before_it_is(windows: Windows, now: dt.datetime) -> None:
    opens = windows.next_open(now)
    assert opens is not None
    assert windows.is_open(opens)
    assert (opens == now) == windows.is_open(now)
    if opens > now:
        assert opens - now <= dt.timedelta(days=14)
        for share in (0.0, 0.3, 0.7, 0.999):
            assert not windows.is_open(now + share * (opens - now))


@given(WINDOWS, INSTANTS)
def test_it_stays_open_until_it_closes(windows: Windows, now: dt.datetime) -> None:
    assume(windows.is_open(now))
    closes = windows.next_close(now)
    if closes is None:
        assert all(windows.is_open(now + dt.timedelta(hours=hours)) for hours in range(0, 7 * 24, 5))
        return
    assert closes > now
    assert not windows.is_open(closes)
    for share in (0.0, 0.3, 0.7, 0.999):
        assert windows.is_open(now + share * (closes - now))


@given(texts(), st.sampled_from(ZONES), INSTANTS)
def test_away_from_changes_of_the_clock_it_is_what_a_clock_on_the_wall_says(
    text: str, zone: str, now: dt.datetime
) -> None:
    window, tzinfo = Window.parse(text), parse_zone(zone)
    days = [now + dt.timedelta(days=days) for days in (-2, -1, 0, 1, 2)]
    assume(len({day.astimezone(tzinfo).utcoffset() for day in days}) == 1)
    wall = now.astimezone(tzinfo)
    minutes = wall.hour * 60 + wall.minute
    today = window.begin_minutes <= minutes < window.end_minutes and wall.weekday() in window.days
    yesterday = minutes + 1440 < window.end_minutes and (wall.weekday() - 1) % 7 in window.days
    assert Windows((window,), tzinfo).is_open(now) == (today or yesterday)
