"""A request ends when its time is over, over HTTP and gRPC, whether it waits or runs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import openai
import pytest

from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answering
from ebbflow.edge.serving.http import create_app
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.server import HttpServer

Make = Callable[..., Model]
ASK: dict[str, Any] = {"model": "faq", "prompt": "Use", "max_tokens": 200, "temperature": 0}


@pytest.fixture
def hub() -> Any:
    hub = Hub(Limits(running=1, queued=2))
    yield hub
    hub.stop()


@pytest.fixture
async def busy(
    hub: Hub, model: Make, slow: Callable[[Model], Model], client: openai.AsyncOpenAI
) -> AsyncIterator[None]:
    """Somebody else's answer takes the only place."""
    hub.swap(slow(model()))
    running = asyncio.create_task(client.completions.create(**ASK))
    await until(lambda: hub.batcher("").load().running)
    yield
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - another thread runs it
            await asyncio.sleep(0.01)


async def gone(hub: Hub) -> None:
    await until(lambda: not (load := hub.batcher("").load()).running + load.queued)


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waits_too_long_gets_a_status(client: openai.AsyncOpenAI, busy: None, *, stream: bool) -> None:
    """Also as a stream: nothing had been sent yet."""
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(**ASK, stream=stream, extra_body={"timeout_s": 0.2})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


async def test_an_answer_under_way_ends_with_an_error_in_the_stream(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    stream = await client.completions.create(**ASK, stream=True, extra_body={"timeout_s": 1.2})
    assert (await anext(stream)).choices[0].text, "it had begun"
    with pytest.raises(openai.APIError) as caught:
        _ = [chunk async for chunk in stream]
    assert caught.value.code == "deadline_exceeded"
    await gone(hub)


async def test_nobody_takes_longer_than_the_agent_allows(
    store: FeedbackStore, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub = Hub(Limits(request_s=0.3))
    hub.swap(slow(model()))
    server = HttpServer(create_app(hub, Answering(hub, store), store), "127.0.0.1:0", grace_s=5)
    await server.start()
    async with openai.AsyncOpenAI(base_url=f"http://{server.address}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(**ASK, extra_body={"timeout_s": 100})
        assert caught.value.status_code == 504
    await server.stop()
    hub.stop()


async def test_a_stream_that_has_no_place_is_refused_with_a_status(
    client: openai.AsyncOpenAI, hub: Hub, busy: None
) -> None:
    waiting = [asyncio.create_task(client.completions.create(**ASK)) for _ in range(2)]
    await until(lambda: hub.batcher("").load().queued == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(**ASK, stream=True)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.type == "rate_limit_error"
    another = asyncio.create_task(client.completions.create(**ASK, user="ada", stream=True))
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    assert len(done) == 1, "of who has two places, one makes room for another user"
    assert isinstance(done.pop().exception(), openai.RateLimitError)
    for task in (*waiting, another):
        task.cancel()
    await asyncio.gather(*waiting, another, return_exceptions=True)


async def test_the_real_client_tries_again_when_told_to(server: HttpServer, hub: Hub, busy: None) -> None:
    """With its own retries, the client waits as long as the agent says, and gets its answer."""
    async with openai.AsyncOpenAI(base_url=f"http://{server.address}/v1", api_key="x", max_retries=8) as patient:
        asks = [patient.completions.create(**{**ASK, "max_tokens": 2}, user=f"u{n}") for n in range(4)]
        found = await asyncio.gather(*asks)
    assert all(done.choices[0].finish_reason for done in found)


async def test_a_grpc_deadline_ends_the_generation(
    stub: Any, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    from ebbflow.api.v1 import inference_pb2 as pb

    hub.swap(slow(model()))
    request = pb.GenerateRequest(prompt="Use", sampling=pb.Sampling(max_tokens=500))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request, timeout=0.4):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await gone(hub)


async def test_a_grpc_caller_beyond_the_queue_is_told_so(stub: Any, hub: Hub, busy: None) -> None:
    from ebbflow.api.v1 import inference_pb2 as pb
    from ebbflow.common.errors import Reason
    from ebbflow.common.rpc.errors import from_rpc_error

    request = pb.GenerateRequest(prompt="Use", sampling=pb.Sampling(max_tokens=100))
    waiting = [stub.Generate(request) for _ in range(2)]
    await until(lambda: hub.batcher("").load().queued == 2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request):
            pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = from_rpc_error(caught.value)
    assert error.reason is Reason.QUEUE_FULL
    assert int(error.metadata["retry_after_s"]) >= 1
    for call in waiting:
        call.cancel()
