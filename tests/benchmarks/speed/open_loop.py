"""Open-loop load on an OpenAI-compatible server: requests come when they come, whether or not the last are answered.

The client reads HTTP itself: it shares the machine with the server, and a library would take more of it.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

LOST_S = 30.0
"""After so long without a byte a request has failed."""


@dataclass(frozen=True)
class Asked:
    """What every request asks for, but for its prompt."""

    address: str
    """host:port."""
    model: str
    answer_tokens: int
    banned: Sequence[int]
    """Tokens that must not come, so that no answer ends early."""


@dataclass(frozen=True)
class Served:
    """What became of one request, in seconds of the same clock."""

    due_s: float
    """When it was due, late or not: a client that is held up must not flatter the server."""
    first_s: float
    """When the first text came; infinite if none did."""
    end_s: float
    prompt_tokens: int
    answer_tokens: int

    @property
    def wait_s(self) -> float:
        """From when it was due to its first text."""
        return self.first_s - self.due_s


@dataclass
class Load:
    """What came of one rate.

    Attributes:
        rate: requests per second that were asked for.
    """

    rate: float
    served: list[Served] = field(default_factory=list)
    gave_up: bool = False

    def wait_ms(self, percent: int) -> float:
        """A percentile of the time to the first text, by nearest rank."""
        waits = sorted(served.wait_s for served in self.served)
        return 1e3 * waits[max(0, math.ceil(len(waits) * percent / 100) - 1)]

    @property
    def tokens_s(self) -> float:
        """Tokens of answers over the time from the first request to the last token."""
        span_s = max(served.end_s for served in self.served) - min(served.due_s for served in self.served)
        return sum(served.answer_tokens for served in self.served) / span_s

    @property
    def failed(self) -> int:
        """Requests without an answer."""
        return sum(served.first_s == math.inf for served in self.served)


def arrivals_s(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process; those of two rates have the same shape."""
    gaps, now, found = random.Random(seed), 0.0, []
    while (now := now + gaps.expovariate(1.0) / rate) < seconds:
        found.append(now)
    return found


async def load(asked: Asked, prompts: Iterator[str], rate: float, seconds: float, give_up_ms: float) -> Load:
    """Sends requests at a rate for some seconds and waits for all answers.

    Args:
        asked: to whom.
        prompts: the next ones; none should come twice, or a cache of prompts answers instead of the engine.
        rate: requests per second.
        seconds: for which requests are sent.
        give_up_ms: stops sending when an answer has been waited for so long: this rate is lost.
    """
    found = Load(rate)
    begin = time.perf_counter()
    waiting: set[float] = set()
    under_way = []
    for after_s in arrivals_s(rate, seconds, seed=1) or [0.0]:
        due_s = begin + after_s
        await asyncio.sleep(due_s - time.perf_counter())
        if waiting and time.perf_counter() - min(waiting) > give_up_ms / 1e3:
            found.gave_up = True
            break
        under_way.append(asyncio.create_task(request(asked, next(prompts), due_s, waiting)))
    found.served = list(await asyncio.gather(*under_way))
    return found


async def request(asked: Asked, prompt: str, due_s: float, waiting: set[float]) -> Served:
    """One streamed completion; while no text has come, its time is in `waiting`."""
    waiting.add(due_s)
    try:
        return await _request(asked, prompt, due_s, waiting)
    except (OSError, TimeoutError, ValueError):
        return Served(due_s, math.inf, time.perf_counter(), 0, 0)
    finally:
        waiting.discard(due_s)


async def _request(asked: Asked, prompt: str, due_s: float, waiting: set[float]) -> Served:
    host, _, port = asked.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(_head_and_body(asked, prompt))
        first_s, usage = math.inf, dict[str, int]()
        async for event in _events(reader):
            if first_s == math.inf and any(choice.get("text") for choice in event.get("choices", ())):
                first_s = time.perf_counter()
                waiting.discard(due_s)
            usage = event.get("usage") or usage
        tokens = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        return Served(due_s, first_s, time.perf_counter(), *tokens)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """What a server sends, event by event; the framing of HTTP's chunks lies between the lines."""
    while True:
        async with asyncio.timeout(LOST_S):
            line = await reader.readline()
        if not line or line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def _head_and_body(asked: Asked, prompt: str) -> bytes:
    body = json.dumps(
        {
            "model": asked.model,
            "prompt": prompt,
            "max_tokens": asked.answer_tokens,
            "temperature": 0.0,
            "logit_bias": {str(token): -100 for token in asked.banned},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {asked.address}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def capacity(asked: Asked, prompts: Iterator[str], streams: int, rounds: int) -> float:
    """Requests per second when so many clients ask one after the other."""

    async def client() -> None:
        for _ in range(rounds):
            served = await request(asked, next(prompts), time.perf_counter(), set())
            if not served.answer_tokens:
                raise ValueError(f"{asked.address} does not answer")

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(streams)))
    return streams * rounds / (time.perf_counter() - begin)
