"""Swaps, disconnects and shutdown beside running requests."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import openai
import pytest

from ebbflow.edge.engine.base import Logits, StepEntry
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.server import HttpServer

Make = Callable[..., Model]


async def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        await asyncio.sleep(0.01)


async def test_no_request_is_dropped_while_releases_are_swapped(
    client: openai.AsyncOpenAI, hub: Hub, model: Make
) -> None:
    """Every answer is what its own release says alone, whichever swaps happened meanwhile."""
    alone: dict[str, dict[int, str]] = {}
    for number in (1, 2):
        hub.swap(model(number))
        alone[f"students/faq/releases/{number}"] = {
            seed: (await client.completions.create(model="faq", prompt="Use", max_tokens=60, seed=seed)).choices[0].text
            for seed in range(6)
        }
    answers: Counter[str] = Counter()
    stop = asyncio.Event()

    async def user(seed: int) -> None:
        while not stop.is_set():
            stream = await client.completions.create(model="faq", prompt="Use", max_tokens=60, seed=seed, stream=True)
            chunks = [chunk async for chunk in stream]
            release = chunks[0].model
            assert "".join(chunk.choices[0].text for chunk in chunks) == alone[release][seed]
            assert chunks[-1].choices[0].finish_reason
            answers[release] += 1

    async def swap() -> None:
        for turn in itertools.count():
            if turn >= 12 and set(answers) == set(alone):
                break
            hub.swap(model(1 + turn % 2))
            await asyncio.sleep(0.1)
        stop.set()

    async with asyncio.timeout(120):
        await asyncio.gather(swap(), *(user(seed) for seed in range(6)))
    assert set(answers) == set(alone)


async def test_a_retired_engine_is_let_go_once_its_last_request_is_answered(
    client: openai.AsyncOpenAI, hub: Hub, model: Make
) -> None:
    hub.swap(model(1))
    batcher = hub.batcher("faq")
    stream = await client.completions.create(model="faq", prompt="Use", max_tokens=300, seed=4, stream=True)
    hub.swap(model(2))
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {"students/faq/releases/1"}
    await until(lambda: batcher._scheduler.releases == ["students/faq/releases/2"])


def counted(model: Model) -> list[int]:
    """Gets an entry for each step from now on, so that an answer that was cut short can be told from a whole one."""
    steps, step = list[int](), model.engine.step

    def count(entries: Sequence[StepEntry]) -> list[Logits]:
        steps.append(len(entries))
        return step(entries)

    model.engine.step = count  # type: ignore[method-assign]
    return steps


def slots(hub: Hub) -> int:
    load = hub.batcher("faq").load()
    return load.running + load.queued


async def test_a_client_that_goes_away_ends_its_generation(
    server: HttpServer, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(one := slow(model()))
    for stream in (True, False):
        steps = counted(one)
        body = {"model": "faq", "prompt": "Use", "max_tokens": 500, "stream": stream, "temperature": 0, "user": "ada"}
        async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as http:
            ask = asyncio.create_task(http.post("/completions", json=body))
            await until(lambda: slots(hub) == 1)
            ask.cancel()
            await asyncio.gather(ask, return_exceptions=True)
        await until(lambda: slots(hub) == 0)
        assert len(steps) < 400, "it did not answer to the end"


async def test_other_requests_go_on_when_one_is_cancelled(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    ask: dict[str, Any] = {"model": "faq", "prompt": "Use", "temperature": 0, "max_tokens": 50}
    whole = (await client.completions.create(**ask)).choices[0].text
    gate = threading.Event()
    hub.batcher("faq").between_steps(lambda _: gate.wait(60))  # so that nobody has his answer before all have asked
    staying = asyncio.create_task(client.completions.create(**ask))
    leaving = [asyncio.create_task(client.completions.create(**ask)) for _ in range(4)]
    await until(lambda: slots(hub) == 5)
    gate.set()
    await until(lambda: hub.batcher("faq").load().running > 0)
    for task in leaving:
        task.cancel()
    assert (await staying).choices[0].text == whole


async def test_a_stopping_server_finishes_what_runs(
    client: openai.AsyncOpenAI, server: HttpServer, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    asks = [
        asyncio.create_task(
            client.completions.create(model="faq", prompt="Use", max_tokens=40, temperature=1, seed=seed, stream=True)
        )
        for seed in range(3)
    ]
    streams = await asyncio.gather(*asks)
    stopping = asyncio.create_task(server.stop())
    for stream in streams:
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason
    await client.close()
    await stopping


async def test_a_removed_student_answers_to_the_end_and_is_gone(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    running = asyncio.create_task(client.completions.create(model="faq", prompt="Use", max_tokens=40, seed=1))
    batcher = hub.batcher("faq")
    await until(lambda: slots(hub) == 1)
    hub.remove("students/faq")
    assert (await running).choices[0].finish_reason
    await until(lambda: not batcher._thread.is_alive())
    assert [entry async for entry in client.models.list()] == []


async def test_a_stream_that_is_closed_ends_all_its_choices(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    """As applications do when their user presses stop; other answers go on."""
    hub.swap(one := slow(model()))
    ask: dict[str, Any] = {"model": "faq", "prompt": "Use", "max_tokens": 500, "temperature": 0}
    staying = asyncio.create_task(client.completions.create(**{**ask, "max_tokens": 300}))
    stream = await client.completions.create(**ask, n=3, stream=True)
    await anext(stream)
    assert slots(hub) == 4
    await stream.close()
    await until(lambda: slots(hub) == 1)
    assert (await staying).choices[0].finish_reason
    steps = counted(one)
    chat = await client.chat.completions.create(
        model="faq", messages=[{"role": "user", "content": "Hi"}], max_tokens=500, stream=True
    )
    await anext(chat)
    await chat.close()
    await until(lambda: slots(hub) == 0)
    assert len(steps) < 400, "it did not answer to the end"


async def test_who_is_answered_when_the_agent_stops_hears_so(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    ask: dict[str, Any] = {"model": "faq", "prompt": "Use", "max_tokens": 500, "temperature": 0}
    whole = asyncio.create_task(client.completions.create(**ask))
    stream = await client.completions.create(**ask, stream=True)
    await until(lambda: slots(hub) == 2)
    await asyncio.to_thread(hub.stop)
    found = await asyncio.gather(whole, return_exceptions=True)
    assert isinstance(found[0], openai.InternalServerError)
    assert (found[0].status_code, found[0].code) == (503, "agent_stopping")
    with pytest.raises(openai.APIError) as caught:
        _ = [chunk async for chunk in stream]
    assert caught.value.code == "agent_stopping"
