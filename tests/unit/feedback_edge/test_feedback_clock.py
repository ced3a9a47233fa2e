"""The time by which privacy windows are charged: the device's own, whatever the cloud says."""

import datetime as dt
from time import CLOCK_BOOTTIME, clock_gettime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.edge.feedback.clock import OLDEST, FeedbackClock

NOW = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
DAY, HOUR = dt.timedelta(days=1), dt.timedelta(hours=1)
LOST = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Board:
    """A device whose clocks a test sets."""

    def __init__(self, system: dt.datetime = NOW) -> None:
        self.system, self.ticks_s = system, 0.0

    def boot(self, charged: dt.datetime | None = None) -> FeedbackClock:
        return FeedbackClock(charged, lambda: self.system, lambda: self.ticks_s)

    def pass_time(self, time: dt.timedelta) -> None:
        self.system += time
        self.ticks_s += time.total_seconds()


def test_a_clock_that_is_right_is_taken_and_the_cloud_is_not_heard() -> None:
    board = Board()
    clock = board.boot()
    clock.hear(NOW + 730 * DAY)
    assert clock.now() == NOW
    board.pass_time(HOUR)
    assert clock.now() == NOW + HOUR


def test_a_device_without_a_clock_believes_the_cloud_once() -> None:
    board = Board(LOST)
    clock = board.boot()
    assert clock.now() == OLDEST
    clock.hear(NOW)
    for _ in range(50):
        board.pass_time(HOUR)
        clock.hear(clock.now() + 30 * DAY)
    assert clock.now() == NOW + 50 * HOUR


def test_a_device_without_a_clock_goes_on_from_its_last_charge() -> None:
    board = Board(LOST)
    clock = board.boot(charged=NOW)
    clock.hear(NOW - DAY)
    board.pass_time(HOUR)
    assert clock.now() == NOW + HOUR


def test_the_time_is_known_by_a_clock_of_its_own_or_by_the_cloud() -> None:
    assert Board().boot().is_known
    board = Board(LOST)
    clock = board.boot(charged=NOW)
    assert not clock.is_known
    clock.hear(NOW + DAY)
    assert clock.is_known
    clock = board.boot(charged=NOW)
    board.system = NOW + DAY
    assert clock.is_known


def test_time_passes_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    slept_s = 0.0
    monkeypatch.setattr("time.clock_gettime", lambda which: clock_gettime(which) + slept_s * (which == CLOCK_BOOTTIME))
    clock = FeedbackClock(None, lambda: LOST)
    clock.hear(NOW)
    slept_s = 3600.0
    assert dt.timedelta() <= clock.now() - NOW - HOUR < HOUR


def test_a_clock_that_is_set_right_takes_over_from_the_cloud() -> None:
    board = Board(LOST)
    clock = board.boot()
    clock.hear(NOW + 730 * DAY)
    board.system = NOW
    assert clock.now() == NOW


def test_a_clock_that_is_set_back_does_not_go_behind_the_last_charge() -> None:
    board = Board()
    clock = board.boot(charged=NOW - DAY)
    clock.charged(NOW)
    board.system = NOW - 40 * DAY
    assert clock.now() == NOW
    assert board.boot(charged=NOW).now() == NOW


@pytest.mark.parametrize("year", [1, 9999])
def test_no_time_that_the_cloud_says_stops_the_clock(year: int) -> None:
    board = Board(LOST)
    clock = board.boot()
    clock.hear(dt.datetime(year, 12, 31, 23, 59, tzinfo=dt.UTC))
    before = clock.now()
    board.pass_time(HOUR)
    assert clock.now() == before + HOUR


TIMES = st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2200, 1, 1), timezones=st.just(dt.UTC))  # noqa: DTZ001
STEPS = st.lists(st.tuples(st.sampled_from(["hear", "charge", "set", "wait"]), TIMES), max_size=20)


@given(TIMES.filter(lambda time: time >= OLDEST), STEPS)
def test_with_a_clock_of_its_own_the_device_follows_it_alone(
    begin: dt.datetime, steps: list[tuple[str, dt.datetime]]
) -> None:
    board, last = Board(begin), LOST
    clock = board.boot()
    for what, time in steps:
        if what == "hear":
            clock.hear(time)
        elif what == "charge":
            last = clock.now()
            clock.charged(last)
        else:
            board.system = max(time, OLDEST)
        assert clock.now() == max(board.system, last)


@given(TIMES, STEPS)
def test_it_never_runs_backwards_behind_a_charge(begin: dt.datetime, steps: list[tuple[str, dt.datetime]]) -> None:
    board, last = Board(begin), LOST
    clock = board.boot()
    for what, time in steps:
        if what == "hear":
            clock.hear(time)
        elif what == "charge":
            last = clock.now()
            clock.charged(last)
        elif what == "set":
            board.system = time
        else:
            board.ticks_s += time.timestamp() % 1e6
        assert clock.now() >= last


@given(st.lists(st.tuples(TIMES, st.floats(0, 1e6)), min_size=1, max_size=20))
def test_without_a_clock_time_passes_as_it_does(said: list[tuple[dt.datetime, float]]) -> None:
    """However often the cloud says that it is later: what it said first counts, and seconds after that."""
    board = Board(LOST)
    clock = board.boot()
    clock.hear(said[0][0])
    first = clock.now()
    for time, seconds in said[1:]:
        board.ticks_s += seconds
        before = clock.now()
        clock.hear(time)
        assert clock.now() == before
    assert abs(clock.now() - first - dt.timedelta(seconds=board.ticks_s)) < dt.timedelta(milliseconds=1)
