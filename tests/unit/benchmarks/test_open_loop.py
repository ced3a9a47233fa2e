"""The clients that load a server ask when they are due, and count from then."""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speed.open_loop import Asked, Load, Served, arrivals_s, capacity, load

Write = Callable[[bytes], Awaitable[None]]
Answer = Callable[[dict[str, object], Write], Awaitable[None]]
DELAY_S = 0.05


@contextlib.asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[Asked]:
    """Answers every request with a stream whose chunks are what `answer` writes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

        async def write(data: bytes) -> None:
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()

        with contextlib.suppress(ConnectionError):
            await answer(body, write)
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening:
        yield Asked(f"127.0.0.1:{port}", "bench", 3, (2,))


def event(text: str, usage: dict[str, int] | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}], "usage": usage}).encode() + b"\n\n"


async def three_tokens(body: dict[str, object], write: Write) -> None:
    await write(event(""))
    await asyncio.sleep(DELAY_S)
    await write(event(" one") + event(" two"))
    await write(event(" three", {"prompt_tokens": len(str(body["prompt"])), "completion_tokens": 3}))
    await write(b"data: [DONE]\n\n")


async def test_every_answer_is_counted_from_when_it_was_due() -> None:
    async with server(three_tokens) as asked:
        begin = time.perf_counter()
        found = await load(asked, cycle(["ab", "abcd"]), rate=40, seconds=0.5, give_up_ms=60_000)
    due = [served.due_s - begin for served in found.served]
    wanted = arrivals_s(40, 0.5, seed=1)
    assert due[0] >= wanted[0]
    assert [each - due[0] for each in due] == pytest.approx([each - wanted[0] for each in wanted], abs=1e-6)
    assert not found.failed
    assert not found.gave_up
    assert {served.answer_tokens for served in found.served} == {3}
    assert [served.prompt_tokens for served in found.served[:3]] == [2, 4, 2]
    assert all(served.wait_s >= DELAY_S * 0.9 for served in found.served)  # an empty text is no first token
    assert all(served.first_s <= served.end_s for served in found.served)


async def test_a_request_bans_what_would_end_its_answer() -> None:
    seen: list[dict[str, object]] = []

    async def keep(body: dict[str, object], write: Write) -> None:
        seen.append(body)
        await three_tokens(body, write)

    async with server(keep) as asked:
        await load(asked, cycle(["a"]), rate=50, seconds=0.1, give_up_ms=60_000)
    assert seen[0]["logit_bias"] == {"2": -100}
    assert (seen[0]["max_tokens"], seen[0]["stream"], seen[0]["temperature"]) == (3, True, 0.0)


async def test_events_that_arrive_in_pieces_are_read() -> None:
    async def torn(body: dict[str, object], write: Write) -> None:
        data = event(" one", {"prompt_tokens": 1, "completion_tokens": 1})
        await write(data[:-1])
        await write(data[-1:])
        del body

    async with server(torn) as asked:
        found = await load(asked, cycle(["a"]), rate=50, seconds=0.1, give_up_ms=60_000)
    assert [served.answer_tokens for served in found.served] == [1] * len(found.served)


async def test_a_server_that_says_nothing_has_failed() -> None:
    async def silent(body: dict[str, object], write: Write) -> None:
        del body, write

    async with server(silent) as asked:
        found = await load(asked, cycle(["a"]), rate=50, seconds=0.2, give_up_ms=60_000)
        with pytest.raises(ValueError, match="does not answer"):
            await capacity(asked, cycle(["a"]), streams=2, rounds=1)
    assert found.failed == len(found.served) > 0
    assert found.wait_ms(50) == math.inf


async def test_a_hopeless_rate_is_given_up() -> None:
    async def slow(body: dict[str, object], write: Write) -> None:
        await asyncio.sleep(1)
        await three_tokens(body, write)

    async with server(slow) as asked:
        found = await load(asked, cycle(["a"]), rate=40, seconds=10, give_up_ms=200)
    assert found.gave_up
    assert len(found.served) < 40


async def test_a_closed_loop_asks_again_when_it_is_answered() -> None:
    begun_s: list[float] = []

    async def counted(body: dict[str, object], write: Write) -> None:
        begun_s.append(time.perf_counter())
        await three_tokens(body, write)

    begin_s = time.perf_counter()
    async with server(counted) as asked:
        rate = await capacity(asked, cycle(["a", "b"]), streams=4, rounds=3)
    assert len(begun_s) == 12
    assert 12 / (time.perf_counter() - begin_s) <= rate <= 4 / DELAY_S


@given(rate=st.floats(0.1, 100), times=st.floats(1.1, 10), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_the_arrivals_of_two_rates_have_one_shape(rate: float, times: float, seed: int) -> None:
    slow, fast = arrivals_s(rate, 20 / rate, seed), arrivals_s(rate * times, 20 / rate, seed)
    assert len(fast) >= len(slow)
    assert [s / times for s in slow] == pytest.approx(fast[: len(slow)])
    assert all(0 < s < 20 / rate for s in slow)


@given(waits=st.lists(st.floats(0, 100), min_size=1, max_size=300), percent=st.integers(1, 100))
@settings(deadline=None)
def test_a_percentile_is_a_wait_that_so_many_do_not_exceed(waits: list[float], percent: int) -> None:
    found = Load(1.0, [Served(0, wait, wait, 1, 1) for wait in waits])
    limit_s = found.wait_ms(percent) / 1e3
    within = sum(wait <= limit_s * (1 + 1e-12) for wait in waits)
    below = sum(wait < limit_s * (1 - 1e-12) for wait in waits)
    assert within * 100 >= percent * len(waits) > below * 100


def test_throughput_counts_from_the_first_request_to_the_last_token() -> None:
    found = Load(1.0, [Served(10, 11, 12, 5, 30), Served(11, 12, 14, 5, 30)])
    assert found.tokens_s == pytest.approx(15)
