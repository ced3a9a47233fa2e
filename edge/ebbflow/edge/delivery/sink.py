"""Writes and hashes what arrives in a thread of its own, so that the network never waits for them."""

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import BinaryIO

from ebbflow.edge.delivery.appender import Appender
from ebbflow.edge.delivery.files import READ_BYTES
from ebbflow.edge.delivery.frames import Chunk

_AHEAD = 4
"""Chunks that may wait to be written; memory stays bounded however slow the disk is."""


class Sink:
    """Appends to one open file. `put` raises what an earlier chunk met; leaving the block keeps whatever has come.

    Attributes:
        size_bytes: length of the file once everything is written.
    """

    def __init__(self, opened: BinaryIO) -> None:
        """Reads and hashes what is in the file already."""
        self._digest = hashlib.sha256()
        opened.seek(0)
        self.size_bytes = 0
        while block := opened.read(READ_BYTES):
            self._digest.update(block)
            self.size_bytes += len(block)
        self._waiting: deque[Future[None]] = deque()
        self._appender = Appender(opened, self.size_bytes)
        self._pool = ThreadPoolExecutor(1, "delivery-sink")

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error:
            with suppress(OSError):  # the error that is on its way says more
                self._appender.settle()

    def put(self, chunk: Chunk) -> None:
        """Takes the next bytes."""
        if len(self._waiting) >= _AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, chunk))
        self.size_bytes += len(chunk)

    def settle(self) -> None:
        """Waits until everything is on the disk."""
        while self._waiting:
            self._waiting.popleft().result()
        self._pool.submit(self._appender.settle).result()

    def hexdigest(self) -> str:
        """SHA-256 of the whole file; `settle` first."""
        return self._digest.hexdigest()

    def _write(self, chunk: Chunk) -> None:
        self._appender.write(chunk)
        self._digest.update(chunk)
