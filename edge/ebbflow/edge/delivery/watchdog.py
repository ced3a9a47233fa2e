"""Gives up on a call when nothing arrives any more, however long the whole may take."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

PROGRESS_BYTES = 1024
"""What counts as progress: a server that trickles less than this in a silence is as good as silent."""
_LOOKS = 8
"""How often it looks in the time of a silence."""


class Watchdog:
    """Calls `cancel` from a thread of its own after `silence_s` of waiting without progress.

    Only the time between `wait` and `feed` counts, so that neither a slow disk on our side nor a bandwidth limit is
    ever taken for a slow server. The two take no lock: one thread writes, the other looks now and then.
    """

    def __init__(self, cancel: Callable[[], object], silence_s: float) -> None:
        self._cancel, self._silence_s = cancel, silence_s
        self._over = threading.Event()
        self._since_s: float | None = None
        self._waited_s, self._bytes = 0.0, 0
        self.barked = False
        """Whether it gave up."""

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="delivery-watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def wait(self) -> None:
        """A wait for the server begins."""
        self._since_s = time.monotonic()

    def feed(self, size_bytes: int) -> None:
        """Bytes arrived: the wait is over."""
        since_s, self._since_s = self._since_s, None
        self._bytes += size_bytes
        if self._bytes >= PROGRESS_BYTES:
            self._waited_s, self._bytes = 0.0, 0
        elif since_s is not None:
            self._waited_s += time.monotonic() - since_s

    def _watch(self) -> None:
        while not self._over.wait(self._silence_s / _LOOKS):
            since_s = self._since_s
            if since_s is not None and self._waited_s + time.monotonic() - since_s >= self._silence_s:
                self.barked = True
                self._cancel()
                return
