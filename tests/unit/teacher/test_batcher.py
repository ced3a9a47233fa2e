import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from ebbflow.cloud.teacher.batcher import Batcher
from ebbflow.common.errors import EbbflowError, Reason

Job = int | str
Make = Callable[..., Batcher[Job, Job]]


class Machine:
    """Returns its jobs doubled, once it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.busy = threading.Event()
        self.batches: list[list[Job]] = []

    def __call__(self, jobs: Sequence[Job]) -> Sequence[Job]:
        self.busy.set()
        assert self.go.wait(60)
        self.batches.append(list(jobs))
        if "bad" in jobs:
            raise RuntimeError("broken")
        return [job * 2 for job in jobs]


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def make(machine: Machine) -> Iterator[Make]:
    made: list[Batcher[Job, Job]] = []

    def build(max_batch: int = 4, max_waiting: int = 100) -> Batcher[Job, Job]:
        made.append(Batcher(machine, max_batch=max_batch, max_waiting=max_waiting))
        return made[-1]

    yield build
    machine.go.set()
    for batcher in made:
        batcher.close()


async def _busy(batcher: Batcher[Job, Job], machine: Machine) -> asyncio.Task[list[Job]]:
    """Occupies the thread."""
    first = asyncio.create_task(batcher.submit([0]))
    await asyncio.to_thread(machine.busy.wait, 60)
    return first


async def test_what_arrives_while_the_thread_is_busy_makes_up_the_next_batch(make: Make, machine: Machine) -> None:
    batcher = make()
    first = await _busy(batcher, machine)
    others = [asyncio.create_task(batcher.submit([number, number + 10])) for number in (1, 2, 3)]
    await asyncio.sleep(0)
    machine.go.set()
    assert await first == [0]
    assert await asyncio.gather(*others) == [[2, 22], [4, 24], [6, 26]]
    assert machine.batches == [[0], [1, 11, 2, 12], [3, 13]]


async def test_kinds_do_not_mix_and_keep_their_turn(make: Make, machine: Machine) -> None:
    batcher = make()
    first = await _busy(batcher, machine)
    mixed: list[list[Job]] = [[1, "a"], ["b", 2]]
    tasks = [asyncio.create_task(batcher.submit(jobs)) for jobs in mixed]
    await asyncio.sleep(0)
    machine.go.set()
    await first
    assert await asyncio.gather(*tasks) == [[2, "aa"], ["bb", 4]]
    assert machine.batches[1:] == [[1, 2], ["a", "b"]]


async def test_jobs_of_a_caller_that_went_away_are_dropped(make: Make, machine: Machine) -> None:
    batcher = make()
    first = await _busy(batcher, machine)
    gone = asyncio.create_task(batcher.submit([7, 8]))
    stays = asyncio.create_task(batcher.submit([9]))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    machine.go.set()
    await first
    assert await stays == [18]
    assert machine.batches[1:] == [[9]]


async def test_a_full_queue_takes_all_of_a_request_or_nothing(make: Make, machine: Machine) -> None:
    batcher = make(max_waiting=3)
    first = await _busy(batcher, machine)
    waiting = asyncio.create_task(batcher.submit([1, 2]))
    await asyncio.sleep(0)
    with pytest.raises(EbbflowError) as caught:
        await batcher.submit([3, 4])
    assert caught.value.reason is Reason.QUEUE_FULL
    machine.go.set()
    assert [await first, await waiting] == [[0], [2, 4]]


async def test_an_error_reaches_its_callers_and_the_thread_goes_on(make: Make, machine: Machine) -> None:
    batcher = make()
    machine.go.set()
    with pytest.raises(RuntimeError):
        await batcher.submit(["bad"])
    assert await batcher.submit(["ok"]) == ["okok"]


async def test_closing_refuses_what_waits(make: Make, machine: Machine) -> None:
    batcher = make()
    first = await _busy(batcher, machine)
    waiting = asyncio.create_task(batcher.submit([1]))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(batcher.close))
    with pytest.raises(EbbflowError) as caught:
        await waiting
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE
    machine.go.set()
    await asyncio.gather(first, closing)
    with pytest.raises(EbbflowError):
        await batcher.submit([2])
