"""Waits grow, are bounded and jittered; a watcher looks when told to and when nobody says a word."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.waiting import SHUT_OUT, Backoff, Pace, jittered, to_next
from ebbflow.edge.agent.watcher import Watcher

SECRET = "what a user said"
GONE = EbbflowError(Reason.SERVER_UNAVAILABLE, "gone")


@given(st.integers(1, 100))
def test_waits_double_up_to_the_bound_and_are_never_zero(failures: int) -> None:
    pace = Pace(first_s=1, most_s=60)
    backoff = Backoff(pace, draw=lambda _low, high: high)
    waits_s = [backoff.failed(GONE) for _ in range(failures)]
    assert waits_s == [min(60.0, 2.0**n) for n in range(failures)]
    assert Backoff(pace, draw=lambda low, _high: low).failed(None) == pytest.approx(0.1)


def test_a_connection_that_lasted_forgets_failures_and_a_short_one_does_not() -> None:
    backoff = Backoff(Pace(first_s=1, steady_s=30), draw=lambda _low, high: high)
    assert [backoff.failed(GONE) for _ in range(3)] == [1, 2, 4]
    backoff.lasted(1)
    assert backoff.failed(GONE) == 8
    backoff.lasted(31)
    assert backoff.failed(GONE) == 1


def name_of(reason: Reason) -> str:
    return reason.name


REFUSALS = sorted(SHUT_OUT, key=name_of)


@pytest.mark.parametrize("reason", REFUSALS, ids=name_of)
def test_who_is_shut_out_does_not_hurry(reason: Reason) -> None:
    backoff = Backoff(Pace(shut_out_s=600))
    assert all(300 <= backoff.failed(EbbflowError(reason, "no")) <= 900 for _ in range(20))


@given(st.floats(0, 1e6))
def test_jitter_stays_within_a_fifth(seconds: float) -> None:
    assert 0.8 * seconds <= jittered(seconds) <= 1.2 * seconds


@given(st.integers(1, 300), st.floats(0, 1e4))
def test_a_grid_has_no_moment_but_its_own(step_s: int, passed_s: float) -> None:
    moment_s = passed_s + to_next(step_s, passed_s)
    assert moment_s == pytest.approx(step_s * (passed_s // step_s + 1))
    assert passed_s >= step_s or moment_s == pytest.approx(step_s)


class Looks:
    """Counts looks; fails where it is told to."""

    def __init__(self, wait_s: float, failures: int = 0) -> None:
        self.count, self._wait_s, self._failures = 0, wait_s, failures
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> float:
        self.count += 1
        await self.gate.wait()
        if self.count <= self._failures:
            raise GONE if self.count % 2 else RuntimeError(SECRET)
        return self._wait_s


@contextlib.asynccontextmanager
async def watching(looks: Looks) -> AsyncIterator[Watcher]:
    watcher = Watcher("test", looks, Pace(first_s=0.01, most_s=0.02))
    task = asyncio.create_task(watcher.run())
    yield watcher
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def reach(looks: Looks, count: int) -> None:
    async with asyncio.timeout(60):
        while looks.count < count:  # noqa: ASYNC110 - a look sets no event
            await asyncio.sleep(0.005)


async def test_nothing_is_looked_at_before_the_first_hint_and_then_on_the_timer() -> None:
    looks = Looks(0.02)
    async with watching(looks) as watcher:
        await asyncio.sleep(0.05)
        assert looks.count == 0
        watcher.hint()
        await reach(looks, 4)


async def test_hints_during_a_look_cause_one_more_look() -> None:
    looks = Looks(60)
    looks.gate.clear()
    async with watching(looks) as watcher:
        watcher.hint()
        await reach(looks, 1)
        for _ in range(10):
            watcher.hint()
        looks.gate.set()
        await reach(looks, 2)
        await asyncio.sleep(0.05)
        assert looks.count == 2


async def test_failures_of_any_kind_are_tried_again_and_tell_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    looks = Looks(60, failures=4)
    async with watching(looks) as watcher:
        watcher.hint()
        await reach(looks, 5)
        await asyncio.sleep(0.05)
    assert looks.count == 5
    assert SECRET not in "".join(capsys.readouterr())


async def test_a_spread_hint_waits_within_its_spread() -> None:
    looks = Looks(60)
    async with watching(looks) as watcher:
        watcher.hint(spread_s=30)
        await asyncio.sleep(0.02)
        watcher.hint(spread_s=0.05)
        await reach(looks, 1)


async def test_a_watcher_wakes_after_just_the_time_that_was_asked_for_or_earlier_when_hinted() -> None:
    looks, loop = Looks(60), asyncio.get_running_loop()
    async with watching(looks) as watcher:
        begin_s = loop.time()
        watcher.wake_in(0.2)
        watcher.wake_in(30)  # the earlier one counts
        await reach(looks, 1)
        assert loop.time() - begin_s >= 0.2
        watcher.wake_in(30)
        watcher.hint()
        await reach(looks, 2)
