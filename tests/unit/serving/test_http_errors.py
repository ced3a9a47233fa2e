"""Every error has the status and the shape that OpenAI's clients know, and tells nothing it should not."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answering
from ebbflow.edge.serving.guards import MAX_BODY_BYTES
from ebbflow.edge.serving.http import create_app
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.server import HttpServer

Make = Callable[..., Model]
SECRET = "my secret prompt"


@pytest.fixture
async def http(server: HttpServer) -> Any:
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as http:
        yield http


async def refusal(client: openai.AsyncOpenAI, **changes: Any) -> openai.APIStatusError:
    ask: dict[str, Any] = {"model": "faq", "prompt": SECRET, "max_tokens": 4} | changes
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(**ask)
    assert SECRET not in caught.value.response.text
    return caught.value


async def test_without_a_model_the_agent_is_unavailable(client: openai.AsyncOpenAI) -> None:
    error = await refusal(client)
    assert (error.status_code, error.code) == (503, "no_model")


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    error = await refusal(client, model="gpt-4")
    assert isinstance(error, openai.NotFoundError)
    assert error.code == "model_not_found"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 9, "prompt": [SECRET, SECRET]}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "top_logprobs"),
        ({"logprobs": -1}, "top_logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"min_p": 1.5}}, "min_p"),
        ({"extra_body": {"timeout_s": 0}}, "timeout_s"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2, 10**6]}, "prompt"),
        ({"prompt": [1, -2]}, "prompt"),
        ({"prompt": [[1, 2], "text"]}, "prompt"),
        ({"prompt": [True, False]}, "prompt"),
        ({"user": "x" * 600}, "user"),
    ],
)
async def test_a_bad_parameter_is_named(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, changes: dict[str, Any], param: str
) -> None:
    hub.swap(model())
    error = await refusal(client, **changes)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param
    assert error.type == "invalid_request_error"


async def test_neutral_values_of_what_is_not_offered_pass(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    neutral: dict[str, Any] = {"n": 1, "frequency_penalty": 0, "logprobs": None, "suffix": None, "echo": False}
    await client.completions.create(model="faq", prompt="Use", max_tokens=2, **neutral)
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    await client.chat.completions.create(
        model="faq", messages=messages, max_tokens=2, response_format={"type": "text"}, logprobs=False
    )


async def test_a_prompt_beyond_the_context_says_so(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    error = await refusal(client, prompt="日本語" * 400)
    assert (error.status_code, error.code) == (400, "context_length_exceeded")
    assert "512" in error.message


async def test_an_empty_chat_is_refused(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="faq", messages=[])


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe",
        b'{"model": "faq", "prompt": "\\ud800"}',
        b'{"model": "faq", "prompt": "a", "temperature": NaN}',
        b'{"model": "faq", "prompt": "a", "max_tokens": 1e400}',
        b"[" * 100_000,
        b'{"model": 5, "prompt": "a"}',
        b"null",
    ],
)
async def test_a_malformed_body_is_a_bad_request(http: httpx.AsyncClient, hub: Hub, model: Make, body: bytes) -> None:
    hub.swap(model())
    found = await http.post("/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_form_of_a_web_page_is_not_read_as_json(http: httpx.AsyncClient, hub: Hub, model: Make) -> None:
    hub.swap(model())
    body = json.dumps({"model": "faq", "prompt": "a"})
    found = await http.post("/completions", content=body, headers={"Content-Type": "text/plain"})
    assert found.status_code == 400


async def test_a_huge_body_is_refused_announced_or_not(http: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        for _ in range(MAX_BODY_BYTES // 65536 + 2):
            yield b" " * 65536

    headers = {"Content-Type": "application/json"}
    for content in (b" " * (MAX_BODY_BYTES + 1), endless()):
        found = await http.post("/completions", content=content, headers=headers)
        assert found.status_code == 413
        assert "error" in found.json()


async def test_a_full_queue_says_when_to_come_back(model: Make, store: FeedbackStore) -> None:
    hub = Hub(Limits(running=1, queued=1))
    hub.swap(model())
    server = HttpServer(create_app(hub, Answering(hub, store), store), "127.0.0.1:0", grace_s=5)
    await server.start()
    async with openai.AsyncOpenAI(base_url=f"http://{server.address}/v1", api_key="x", max_retries=0) as client:
        asks = [client.completions.create(model="faq", prompt="a", max_tokens=400, seed=i) for i in range(8)]
        found = await asyncio.gather(*asks, return_exceptions=True)
    refused = [error for error in found if isinstance(error, BaseException)]
    assert refused
    assert len(refused) < 8
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert error.response.headers["retry-after"] == "1"
        assert error.code == "queue_full"
    await server.stop()
    hub.stop()


async def test_a_key_is_asked_for_where_one_is_configured(hub: Hub, model: Make, store: FeedbackStore) -> None:
    hub.swap(model())
    server = HttpServer(create_app(hub, Answering(hub, store), store, "sésame"), "127.0.0.1:0", grace_s=5)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as http:
        for authorization in ("", "Bearer wrong", "sésame"):
            found = await http.get("/models", headers={b"Authorization": authorization.encode()})
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
        right = await http.get("/models", headers={b"Authorization": "Bearer sésame".encode()})
        assert right.status_code == 200
    async with openai.AsyncOpenAI(base_url=f"http://{server.address}/v1", api_key="guess", max_retries=0) as stranger:
        for ask in (
            stranger.completions.create(model="faq", prompt="a"),
            stranger.chat.completions.create(model="faq", messages=[{"role": "user", "content": "a"}]),
            stranger.embeddings.create(model="faq", input="a"),
            stranger.models.list(),
        ):
            with pytest.raises(openai.AuthenticationError):
                await ask
    await server.stop()


async def test_a_foreign_host_name_is_refused(http: httpx.AsyncClient) -> None:
    assert (await http.get("/models", headers={"Host": "evil.example:8080"})).status_code == 421
    for host in ("localhost:8080", "127.0.0.1", "[::1]:8080"):
        assert (await http.get("/models", headers={"Host": host})).status_code == 200


async def test_unknown_paths_answer_in_the_same_shape(http: httpx.AsyncClient) -> None:
    assert (await http.get("/nothing")).json()["error"]["type"] == "invalid_request_error"
    assert (await http.get("/completions")).status_code == 405


async def test_a_failing_engine_ends_its_requests_only_and_leaks_nothing(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = model()

    def fail(_entries: object) -> None:
        raise ValueError(SECRET)

    broken.engine.step = fail  # type: ignore[method-assign,assignment]
    hub.swap(broken)
    error = await refusal(client)
    assert error.status_code == 500
    hub.swap(model())
    assert (await client.completions.create(model="faq", prompt="Use", max_tokens=2)).usage
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
