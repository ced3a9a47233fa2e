"""One thing after another, on a thread of their own, in the order in which they were asked for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

from ebbflow.common.errors import EbbflowError, Reason

T = TypeVar("T")


class Turns:
    """A thread and its queue. Who waits for a turn waits on a future, and takes no thread from anybody else."""

    def __init__(self, name: str, limit: int) -> None:
        """Starts nothing yet.

        Args:
            name: of the thread.
            limit: how many that may be refused may wait or run.
        """
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._room = threading.BoundedSemaphore(limit)

    def put(self, do: Callable[[], T]) -> "Future[T]":
        """Does something behind all that waits, however much that is.

        Raises:
            EbbflowError: AGENT_STOPPING after `finish`.
        """
        try:
            return self._executor.submit(do)
        except RuntimeError as error:
            raise EbbflowError(Reason.AGENT_STOPPING, "the feedback store is closed") from error

    def put_if_room(self, do: Callable[[], T]) -> "Future[T]":
        """Does something behind all that waits, unless too much waits.

        Raises:
            EbbflowError: QUEUE_FULL, or AGENT_STOPPING after `finish`.
        """
        if not self._room.acquire(blocking=False):
            raise EbbflowError(Reason.QUEUE_FULL, "too much waits for the feedback store; its file is busy")
        try:
            future = self.put(do)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def finish(self, within_s: float) -> None:
        """Does what waits while there is time, and cancels the rest; what has begun is waited for. Idempotent."""
        with suppress(RuntimeError):
            wait([self._executor.submit(int)], within_s)
        self._executor.shutdown(cancel_futures=True)

    def abandon(self) -> None:
        """Cancels what waits, and waits for nothing. Idempotent."""
        self._executor.shutdown(wait=False, cancel_futures=True)
