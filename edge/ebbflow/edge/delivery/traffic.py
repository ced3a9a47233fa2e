"""When and how fast weights come over the network: a limit, windows, and a brake. Metadata is not concerned."""

import datetime as dt
import threading
import time
from collections.abc import Callable

from ebbflow.edge.delivery.limit import LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES, Bucket, chunk_bytes
from ebbflow.edge.delivery.windows import Windows

_STEP = 16
"""Factor between the lengths of messages that are tried."""


class TransferPausedError(Exception):
    """A transfer that stopped on purpose; what came is kept, and the next attempt goes on from there.

    Attributes:
        resume_time: when the next window opens, aware; None if there is no telling, or if the brake was pulled.
        braked: whether the brake was pulled: what was being fetched is no longer wanted.
        fetched_bytes: bytes that the attempt fetched.
        resumed_bytes: bytes that were there before it.
    """

    def __init__(self, resume_time: dt.datetime | None = None, *, braked: bool = False) -> None:
        super().__init__("the transfer waits")
        self.resume_time, self.braked = resume_time, braked
        self.fetched_bytes = self.resumed_bytes = 0


class Brake:
    """Stops one installation from another thread."""

    def __init__(self) -> None:
        self._pulled = threading.Event()

    def pull(self) -> None:
        """Stops the transfer at its next chunk; what is past fetching goes on."""
        self._pulled.set()

    def check(self) -> None:
        """Does nothing, unless the brake was pulled.

        Raises:
            TransferPausedError: it was.
        """
        if self._pulled.is_set():
            raise TransferPausedError(braked=True)

    def wait(self, seconds: float) -> None:
        """Waits; raises as `check` at once when the brake is pulled."""
        self._pulled.wait(seconds)
        self.check()


class Traffic:
    """What one device allows. Thread-safe as far as one transfer runs at a time."""

    def __init__(
        self,
        rate: int = 0,
        windows: Windows | None = None,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes the device's settings.

        Args:
            rate: most bytes a second; 0 for no limit.
            windows: when to fetch; always without them.
            now: the time by which windows open, aware.
            monotonic: seconds that never run backwards.
        """
        self.rate, self.windows, self._now, self._monotonic = rate, windows or Windows(), now, monotonic
        self._bucket = Bucket(rate, monotonic()) if rate else None
        self._longest_bytes = MOST_CHUNK_BYTES

    @property
    def chunk_bytes(self) -> int:
        """Longest message to ask for."""
        return min(chunk_bytes(self.rate), self._longest_bytes)

    def falter(self) -> None:
        """Nothing whole came for a long time. The link may be too slow for long messages, so shorter ones are next."""
        self._longest_bytes = max(LEAST_CHUNK_BYTES, self._longest_bytes // _STEP)

    def recover(self) -> None:
        """A file has come: longer messages are worth another try."""
        self._longest_bytes = min(MOST_CHUNK_BYTES, self._longest_bytes * _STEP)

    def admit(self, brake: Brake) -> None:
        """Lets the caller begin, or go on.

        Raises:
            TransferPausedError: no window is open, or the brake was pulled.
        """
        brake.check()
        if self.windows.windows and not self.windows.is_open(now := self._now()):
            raise TransferPausedError(self.windows.next_open(now))

    def spend(self, size_bytes: int, brake: Brake) -> None:
        """Accounts for bytes that came, and waits as long as the limit asks for."""
        if self._bucket and (wait_s := self._bucket.take(size_bytes, self._monotonic())) > 0:
            brake.wait(wait_s)

    def next_window_time(self) -> dt.datetime | None:
        """When the next window opens; None while one is open, and without windows."""
        now = self._now()
        return None if self.windows.is_open(now) else self.windows.next_open(now)
