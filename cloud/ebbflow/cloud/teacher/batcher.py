"""Joins the jobs of all callers into batches for one model thread."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from ebbflow.common.errors import EbbflowError, Reason

Job = TypeVar("Job")
Result = TypeVar("Result")


class Batcher(Generic[Job, Result]):
    """One thread that computes; whatever arrives while it is busy makes up its next batch.

    Jobs of one type go together, in the order of arrival, so nobody waits for a batch to fill and nobody starves.
    """

    def __init__(
        self, compute: Callable[[Sequence[Job]], Sequence[Result]], *, max_batch: int, max_waiting: int = 1024
    ) -> None:
        """Starts the thread.

        Args:
            compute: answers jobs of one type, in order; runs in the thread, never twice at once.
            max_batch: most jobs of one call to `compute`.
            max_waiting: most jobs in the queue.
        """
        self._compute = compute
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._queue: deque[tuple[Job, Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)
        self._thread.start()

    async def submit(self, jobs: Sequence[Job]) -> list[Result]:
        """Answers jobs, in order. Those of a caller that goes away are dropped unless they are being computed.

        Raises:
            EbbflowError: QUEUE_FULL if they do not all fit, SERVER_UNAVAILABLE after `close`.
        """
        futures = self._enqueue(jobs)
        try:
            return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Lets the batch that is being computed end, and refuses the rest."""
        with self._changed:
            self._closed = True
            waiting, self._queue = self._queue, deque()
            self._changed.notify_all()
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(_stopped())
        self._thread.join()

    def _enqueue(self, jobs: Sequence[Job]) -> list[Future[Result]]:
        futures: list[Future[Result]] = [Future() for _ in jobs]
        with self._changed:
            if self._closed:
                raise _stopped()
            if len(self._queue) + len(jobs) > self._max_waiting:
                raise EbbflowError(Reason.QUEUE_FULL, f"{len(self._queue)} texts wait for the teacher already")
            self._queue.extend(zip(jobs, futures, strict=True))
            self._changed.notify_all()
        return futures

    def _run(self) -> None:
        while batch := self._next_batch():
            jobs = [job for job, _ in batch]
            try:
                results = self._compute(jobs)
            except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the callers, not to this thread
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)

    def _next_batch(self) -> list[tuple[Job, Future[Result]]]:
        """Waits for jobs; returns none when closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return []
                if batch := self._take():
                    return batch

    def _take(self) -> list[tuple[Job, Future[Result]]]:
        """Takes the oldest job and those of its type; leaves the others in their order."""
        batch: list[tuple[Job, Future[Result]]] = []
        others: deque[tuple[Job, Future[Result]]] = deque()
        while self._queue and len(batch) < self._max_batch:
            job, future = self._queue.popleft()
            if batch and type(job) is not type(batch[0][0]):
                others.append((job, future))
            elif future.set_running_or_notify_cancel():
                batch.append((job, future))
        self._queue.extendleft(reversed(others))
        return batch


def _stopped() -> EbbflowError:
    return EbbflowError(Reason.SERVER_UNAVAILABLE, "the teacher is stopping")
