"""Streams a blob: a chunk is read while the one before it is on its way, in memory that does not grow.

What the page cache holds is read right here, anything else in a file thread. A chunk is framed as the message that the
contract names when it is read, so that protobuf never touches the bytes. Nothing is hashed, because every reader
compares the whole with what was signed.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager

from ebbflow.api.v1 import artefact_pb2 as pb
from ebbflow.cloud.blobs.base import PromptReader, Reader

MOST_CHUNK_BYTES = 1024 * 1024
"""What the contract allows, and the fastest on loopback."""
LEAST_CHUNK_BYTES = 16 * 1024
BUFFERED_BYTES = 36 * 1024 * 1024
"""What all streams of a process together may hold, up to the number at which chunks have become the shortest."""
HELD_CHUNKS = 8
"""What one stream holds, in chunks, as measured: read, framed and read ahead here, framed and encrypted inside gRPC."""

_TAG = bytes([pb.ReadBlobResponse.CHUNK_FIELD_NUMBER << 3 | 2])  # field, length-delimited
_MORE, _BITS = 0x80, 7


class Transfers:
    """The streams of one process. Used on the event loop only.

    Many streams at once get shorter chunks each, so that the memory of them all stays the same.
    """

    def __init__(self, pool: Executor) -> None:
        """Reads files in the threads of `pool`."""
        self._pool = pool
        self._running = 0

    @property
    def chunk_bytes(self) -> int:
        """Length of the next chunk of any stream."""
        share = BUFFERED_BYTES // (HELD_CHUNKS * max(1, self._running))
        return max(LEAST_CHUNK_BYTES, min(MOST_CHUNK_BYTES, share))

    async def stream(self, reader: Reader, most_bytes: int = 0) -> AsyncGenerator[bytes, None]:
        """Yields what is left of a file as serialised `ReadBlobResponse`s, and closes it in the end.

        The caller must close the iterator (`aclosing`) if it ends early.

        Args:
            reader: where to read.
            most_bytes: longest chunk that the receiver wants; 0 leaves it to us.
        """
        prompt = reader if isinstance(reader, PromptReader) else None
        async with self._counted():
            ahead = self._read(reader, prompt, most_bytes)
            try:
                while message := ahead if isinstance(ahead, bytes) else await asyncio.shield(ahead):
                    ahead = self._read(reader, prompt, most_bytes)
                    yield message
            finally:
                if isinstance(ahead, bytes):
                    reader.close()
                else:  # a read that still runs holds the reader; it is closed when that has ended
                    ahead.add_done_callback(lambda done: _close(reader, done))

    def _read(self, reader: Reader, prompt: PromptReader | None, most_bytes: int) -> "bytes | asyncio.Future[bytes]":
        size_bytes = min(self.chunk_bytes, most_bytes or MOST_CHUNK_BYTES)
        if prompt is not None and (chunk := prompt.read_at_once(size_bytes)) is not None:
            return framed(chunk)
        return asyncio.get_running_loop().run_in_executor(self._pool, _next_message, reader, size_bytes)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


def framed(chunk: bytes | memoryview) -> bytes:
    """Returns `ReadBlobResponse(chunk=chunk)` as protobuf serialises it; nothing for no bytes, which end a stream."""
    if not chunk:
        return b""
    length, digits = len(chunk), bytearray()
    while length >= _MORE:
        digits.append(length & (_MORE - 1) | _MORE)
        length >>= _BITS
    digits.append(length)
    return b"".join((_TAG, digits, chunk))


def _next_message(reader: Reader, size_bytes: int) -> bytes:
    return framed(reader.read(size_bytes))


def _close(reader: Reader, done: "asyncio.Future[bytes]") -> None:
    reader.close()
    if not done.cancelled():
        done.exception()  # whoever waited for it has gone
