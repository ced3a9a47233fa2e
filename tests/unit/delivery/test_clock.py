"""The clock by which signatures expire."""

import datetime as dt
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.edge.delivery.clock import TrustClock

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
times = st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC))  # noqa: DTZ001


class Board:
    """A device whose clocks a test sets."""

    def __init__(self, path: Path) -> None:
        self.path, self.system, self.ticks_s = path, NOW, 0.0

    def boot(self) -> TrustClock:
        return TrustClock(self.path, lambda: self.system, lambda: self.ticks_s)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path / "clock")


def test_a_clock_that_is_right_is_taken(board: Board) -> None:
    assert board.boot().now() == NOW


def test_a_device_without_a_clock_goes_on_from_the_clouds_time(board: Board) -> None:
    board.system = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    clock = board.boot()
    clock.hear(NOW)
    board.ticks_s = 90.0
    assert clock.now() == NOW + dt.timedelta(seconds=90)


def test_a_good_time_holds_over_a_restart_and_a_clock_set_back(board: Board) -> None:
    board.boot().accept(NOW)
    board.system = NOW - dt.timedelta(days=400)
    assert board.boot().now() == NOW


def test_a_clock_that_ran_ahead_leaves_no_trace(board: Board) -> None:
    board.system = NOW + dt.timedelta(days=10_000)
    assert board.boot().now() == board.system
    board.system = NOW
    assert board.boot().now() == NOW


def test_the_file_is_written_once_an_hour_at_most(board: Board) -> None:
    clock = board.boot()
    clock.accept(NOW)
    os.utime(board.path, ns=(1, 1))  # a file system's clock may stand still for some milliseconds
    clock.accept(NOW + dt.timedelta(minutes=59))
    assert board.path.stat().st_mtime_ns == 1
    clock.accept(NOW + dt.timedelta(minutes=60))
    assert board.path.stat().st_mtime_ns > 1


@pytest.mark.parametrize("content", [b"", b"yesterday", b"\xff\xff", b"2026-11-01", b"9999-99-99T00:00:00+00:00"])
def test_a_damaged_file_is_ignored(board: Board, content: bytes) -> None:
    board.path.write_bytes(content)
    assert board.boot().now() == NOW


@given(accepted=st.lists(times, max_size=5), heard=times, system=times)
def test_it_never_runs_backwards_past_a_good_time(
    tmp_path_factory: pytest.TempPathFactory, accepted: list[dt.datetime], heard: dt.datetime, system: dt.datetime
) -> None:
    board = Board(tmp_path_factory.mktemp("clock") / "clock")
    clock = board.boot()
    for time in accepted:
        clock.accept(time)
    board.system = system
    clock.hear(heard)
    assert all(clock.now() >= time for time in [*accepted, heard, system])
    assert all(board.boot().now() >= time - dt.timedelta(hours=1) for time in accepted)
