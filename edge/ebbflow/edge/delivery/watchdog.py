"""Gives up on a call when nothing arrives any more, however long the whole may take."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

PROGRESS_BYTES = 1024
"""What counts as progress: a server that trickles less than this in a silence is as good as silent."""


class Watchdog:
    """Calls `cancel` from a thread of its own after `silence_s` of waiting without progress.

    Only the time inside `waiting` counts, so that a slow disk on our side is never taken for a slow server.
    """

    def __init__(self, cancel: Callable[[], object], silence_s: float) -> None:
        self._cancel, self._silence_s = cancel, silence_s
        self._condition = threading.Condition()
        self._waiting_since: float | None = None
        self._waited_s, self._bytes = 0.0, 0
        self._ended = False
        self.barked = False
        """Whether it gave up."""

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="delivery-watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._condition:
            self._ended = True
            self._condition.notify()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Surrounds one wait for the server."""
        with self._condition:
            self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            with self._condition:
                self._waited_s += time.monotonic() - self._waiting_since
                self._waiting_since = None

    def feed(self, size_bytes: int) -> None:
        """Says that bytes arrived."""
        with self._condition:
            self._bytes += size_bytes
            if self._bytes >= PROGRESS_BYTES:
                self._waited_s, self._bytes = 0.0, 0

    def _watch(self) -> None:
        with self._condition:
            while not self._ended:
                left_s = self._silence_s - self._silent_s()
                if left_s <= 0:
                    self.barked = True
                    break
                self._condition.wait(left_s)
        if self.barked:
            self._cancel()

    def _silent_s(self) -> float:
        since = self._waiting_since
        return self._waited_s + (time.monotonic() - since if since is not None else 0.0)
