"""Writes and hashes what arrives in a thread of its own, so that the network never waits for them."""

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

from ebbflow.edge.delivery.files import READ_BYTES
from ebbflow.edge.delivery.frames import Chunk

_AHEAD = 4
"""Chunks that may wait to be written; memory stays bounded however slow the disk is."""

_SYNC_BYTES = 8 << 20
"""What a power cut may take. Synced while more arrives, so that the end need not wait for the disk, and then dropped
from the page cache: on a small device it would push out the weights that serve, and fresh cache pages cost up to ten
times the write itself on virtual machines."""


class Sink:
    """Appends to one open file. `put` raises what an earlier chunk met; leaving the block waits for all of them.

    Attributes:
        size_bytes: length of the file once everything is written.
    """

    def __init__(self, opened: BinaryIO) -> None:
        """Reads and hashes what is in the file already."""
        self._opened, self._digest = opened, hashlib.sha256()
        opened.seek(0)
        self.size_bytes = 0
        while block := opened.read(READ_BYTES):
            self._digest.update(block)
            self.size_bytes += len(block)
        self._waiting: deque[Future[None]] = deque()
        self._unsynced_bytes = 0
        self._pool = ThreadPoolExecutor(1, "delivery-sink")

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def put(self, chunk: Chunk) -> None:
        """Takes the next bytes."""
        if len(self._waiting) >= _AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, chunk))
        self.size_bytes += len(chunk)

    def settle(self) -> None:
        """Waits until everything is written."""
        while self._waiting:
            self._waiting.popleft().result()
        self._opened.flush()

    def hexdigest(self) -> str:
        """SHA-256 of the whole file; `settle` first."""
        return self._digest.hexdigest()

    def _write(self, chunk: Chunk) -> None:
        self._opened.write(chunk)
        self._digest.update(chunk)
        self._unsynced_bytes += len(chunk)
        if self._unsynced_bytes >= _SYNC_BYTES:
            self._opened.flush()
            os.fdatasync(self._opened.fileno())
            os.posix_fadvise(self._opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsynced_bytes = 0
