"""Appends to a file in large pieces that pass by the page cache.

Fetched weights must not push those that serve out of a small device's memory, and filling fresh cache pages costs more
than the write itself. Where a file system knows no O_DIRECT, pieces go through the cache and are dropped from it.
"""

import errno
import fcntl
import mmap
import os
import time
from contextlib import suppress
from typing import BinaryIO

PIECE_BYTES = 2 << 20
"""Length of a piece; each but the first and the last begins and ends at a multiple of it, as O_DIRECT wants."""
MOST_HELD_S = 1.0
"""However slowly bytes come, a process that is killed loses no more of them than what came in this time."""
SYNC_BYTES = 8 << 20
"""What a power cut may take. Synced while more arrives, so that the end need not wait for the disk."""

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class Appender:
    """Appends to one open file."""

    def __init__(self, opened: BinaryIO, size_bytes: int) -> None:
        """Takes a file that was opened to append and has nothing buffered, and its length."""
        self._descriptor = opened.fileno()
        self._size_bytes = size_bytes
        self._buffer = mmap.mmap(-1, PIECE_BYTES)  # pages, hence aligned
        self._held_bytes = 0
        self._unsynced_bytes = 0
        self._direct = _DIRECT != 0
        self._put_s = time.monotonic()

    def write(self, data: bytes | memoryview) -> None:
        """Takes the next bytes.

        Raises:
            OSError: if the disk does not take them.
        """
        left = memoryview(data)
        while left:
            room_bytes = PIECE_BYTES - self._size_bytes % PIECE_BYTES - self._held_bytes
            taken, left = left[:room_bytes], left[room_bytes:]
            self._buffer[self._held_bytes : self._held_bytes + len(taken)] = taken
            self._held_bytes += len(taken)
            if len(taken) == room_bytes:
                self._put_piece()
        if time.monotonic() - self._put_s >= MOST_HELD_S:
            self._put_piece()

    def settle(self) -> None:
        """Writes what is held back, and waits until everything is on the disk.

        Raises:
            OSError: if the disk does not take it.
        """
        self._put_piece()
        self._sync()

    def _put_piece(self) -> None:
        with memoryview(self._buffer)[: self._held_bytes] as piece:
            self._pass_by_the_cache(len(piece) == PIECE_BYTES)
            written_bytes = 0
            while written_bytes < len(piece):
                with piece[written_bytes:] as rest:
                    written_bytes += self._write_some(rest)
        self._size_bytes += self._held_bytes
        self._unsynced_bytes += self._held_bytes
        self._held_bytes = 0
        self._put_s = time.monotonic()
        if self._unsynced_bytes >= SYNC_BYTES:
            self._sync()

    def _write_some(self, rest: memoryview) -> int:
        try:
            return os.write(self._descriptor, rest)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            self._pass_by_the_cache(False)  # the file system wants another alignment
            self._direct = False
            return os.write(self._descriptor, rest)

    def _pass_by_the_cache(self, wanted: bool) -> None:
        if not self._direct:
            return
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        changed = flags | _DIRECT if wanted else flags & ~_DIRECT
        try:
            if changed != flags:
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, changed)
        except OSError:
            self._direct = False

    def _sync(self) -> None:
        os.fdatasync(self._descriptor)
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._unsynced_bytes = 0
