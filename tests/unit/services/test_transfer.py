"""Streaming a blob: framing, sharing memory between streams, reading ahead and giving up."""

import asyncio
import io
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest
from agent_support import until
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1.artefact_pb2 import ReadBlobResponse
from ebbflow.cloud.services.transfer import (
    BUFFERED_BYTES,
    HELD_CHUNKS,
    LEAST_CHUNK_BYTES,
    MOST_CHUNK_BYTES,
    Transfers,
    framed,
)


class Watched(io.BytesIO):
    """A file that says how far it was read, and that can be slow."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[int] = []
        self.threads: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def read(self, size: int | None = -1, /) -> bytes:
        self.begun.set()
        self.go.wait(60)
        assert not self.closed
        self.reads.append(size or 0)
        self.threads.append(threading.get_ident())
        return super().read(size)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as opened:
        yield opened


@given(st.binary(max_size=300) | st.integers(0, 1 << 21).map(bytes))
def test_a_frame_is_what_protobuf_writes(chunk: bytes) -> None:
    if chunk:
        assert framed(chunk) == ReadBlobResponse(chunk=chunk).SerializeToString()
    assert ReadBlobResponse.FromString(framed(chunk)).chunk == chunk


async def test_a_file_comes_whole_and_is_closed(pool: ThreadPoolExecutor) -> None:
    data = bytes(range(256)) * 10_000
    reader = Watched(data)
    messages = [message async for message in Transfers(pool).stream(reader)]
    assert b"".join(ReadBlobResponse.FromString(message).chunk for message in messages) == data
    assert max(reader.reads) == MOST_CHUNK_BYTES
    await _until_closed(reader)


async def test_one_chunk_is_read_ahead_and_no_more(pool: ThreadPoolExecutor) -> None:
    reader = Watched(bytes(10 * MOST_CHUNK_BYTES))
    async with aclosing(Transfers(pool).stream(reader)) as messages:
        await anext(messages)
        await until(lambda: len(reader.reads) == 2)
        await asyncio.sleep(0.1)
        assert len(reader.reads) == 2
    await _until_closed(reader)


async def test_what_needs_no_waiting_is_never_left_to_a_thread(pool: ThreadPoolExecutor) -> None:
    class Prompt(Watched):
        """Has two of three chunks in the cache."""

        def read_at_once(self, size_bytes: int) -> memoryview | None:
            if self.tell() // MOST_CHUNK_BYTES % 3 == 2:
                return None
            return memoryview(super().read(size_bytes))

    data = random.Random(7).randbytes(7 * MOST_CHUNK_BYTES + 5)
    reader = Prompt(data)
    messages = [message async for message in Transfers(pool).stream(reader)]
    assert b"".join(ReadBlobResponse.FromString(message).chunk for message in messages) == data
    assert reader.threads.count(threading.get_ident()) > len(reader.threads) - 4
    await _until_closed(reader)


async def test_a_stream_without_waiting_that_is_given_up_closes_the_file(pool: ThreadPoolExecutor) -> None:
    class Prompt(Watched):
        def read_at_once(self, size_bytes: int) -> memoryview | None:
            return memoryview(super().read(size_bytes))

    reader = Prompt(bytes(4 * MOST_CHUNK_BYTES))
    async with aclosing(Transfers(pool).stream(reader)) as messages:
        await anext(messages)
        assert len(reader.reads) == 2
    assert reader.closed


async def test_a_stream_that_is_given_up_while_it_reads_closes_the_file_after_the_read(
    pool: ThreadPoolExecutor,
) -> None:
    reader = Watched(bytes(4 * MOST_CHUNK_BYTES))
    reader.go.clear()
    messages = Transfers(pool).stream(reader)
    waiting = asyncio.ensure_future(anext(messages))
    await until(reader.begun.is_set)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not reader.closed
    reader.go.set()
    await _until_closed(reader)


async def test_a_reader_that_fails_ends_the_stream_with_its_error(pool: ThreadPoolExecutor) -> None:
    class Failing(Watched):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.reads:
                raise OSError("the disk has gone")
            return super().read(size)

    reader = Failing(bytes(3 * MOST_CHUNK_BYTES))
    with pytest.raises(OSError, match="gone"):
        async for _ in Transfers(pool).stream(reader):
            pass
    await _until_closed(reader)


@pytest.mark.parametrize(("wanted", "longest"), [(0, MOST_CHUNK_BYTES), (4096, 4096), (1 << 30, MOST_CHUNK_BYTES)])
async def test_nobody_gets_longer_chunks_than_asked_for(pool: ThreadPoolExecutor, wanted: int, longest: int) -> None:
    sizes = [len(message) async for message in Transfers(pool).stream(Watched(bytes(3 * MOST_CHUNK_BYTES)), wanted)]
    assert longest < max(sizes) <= longest + 5


@pytest.mark.parametrize("streams", [1, 2, 8, 50, 500])
async def test_many_streams_hold_no_more_than_a_few(pool: ThreadPoolExecutor, streams: int) -> None:
    transfers = Transfers(pool)
    readers = [Watched(bytes(4 * MOST_CHUNK_BYTES)) for _ in range(streams)]
    running = [transfers.stream(reader) for reader in readers]
    for messages in running:
        await anext(messages)
    assert transfers.chunk_bytes * streams * HELD_CHUNKS <= max(
        BUFFERED_BYTES, streams * HELD_CHUNKS * LEAST_CHUNK_BYTES
    )
    assert LEAST_CHUNK_BYTES <= transfers.chunk_bytes <= MOST_CHUNK_BYTES
    for messages in running:
        await messages.aclose()
    assert transfers.chunk_bytes == MOST_CHUNK_BYTES
    for reader in readers:
        await _until_closed(reader)


async def _until_closed(reader: Watched) -> None:
    await until(lambda: reader.closed)
