"""Embeddings as the real `openai` client sees them."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.answering import Answering
from ebbflow.edge.serving.batcher import Embedding
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.server import HttpServer

Make = Callable[..., Model]


def slow_embedding(model: Model, seconds: float, begun: list[int]) -> Model:
    embed = model.engine.embed

    def wait(token_ids: Any) -> Embedding:
        import time

        begun.append(len(token_ids))
        time.sleep(seconds)
        return embed(token_ids)

    model.engine.embed = wait  # type: ignore[method-assign]
    return model


async def test_vectors_are_the_engines_with_length_one(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    texts = ["How do I read a file?", "Grüße 🦊", "x"]
    tokens = [one.tokenizer.encode(text, bos=True) for text in texts]
    found = await client.embeddings.create(model="faq", input=texts)  # as base64: the client's own choice
    plain = await client.embeddings.create(model="faq", input=tokens, encoding_format="float")
    assert found.model == "students/faq/releases/1"
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokens))
    for index, token_ids in enumerate(tokens):
        expected = model().engine.embed(token_ids)
        expected = expected / np.linalg.norm(expected)
        assert found.data[index].index == index
        np.testing.assert_allclose(found.data[index].embedding, expected, atol=1e-5)
        np.testing.assert_allclose(plain.data[index].embedding, expected, atol=1e-5)
    single = await client.embeddings.create(model="faq", input=texts[0])
    assert single.data[0].embedding == found.data[0].embedding


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input": []}, "invalid_request", "input"),
        ({"input": [[]]}, "invalid_request", "input"),
        ({"input": [[1, 10**7]]}, "invalid_request", "input"),
        ({"input": ["a"] * 2049}, "invalid_request", "input"),
        ({"input": "日本語" * 400}, "context_length_exceeded", None),
        ({"input": "a", "dimensions": 8}, "invalid_request", "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "invalid_request", "encoding_format"),
        ({"input": "a", "user": "x" * 600}, "invalid_request", "user"),
    ],
)
async def test_a_bad_input_is_named(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, changes: dict[str, Any], code: str, param: str | None
) -> None:
    hub.swap(model())
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(**({"model": "faq"} | changes))
    assert (caught.value.code, caught.value.param) == (code, param)


async def test_without_the_model_it_says_so(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    with pytest.raises(openai.InternalServerError) as unavailable:
        await client.embeddings.create(model="faq", input="a")
    assert unavailable.value.status_code == 503
    hub.swap(model())
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="other", input="a")


async def test_answers_go_on_between_texts(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    begun: list[int] = []
    hub.swap(slow_embedding(slow(model()), 0.02, begun))
    embedding = asyncio.create_task(client.embeddings.create(model="faq", input=["a"] * 100))
    while not begun:  # noqa: ASYNC110 - another thread fills it
        await asyncio.sleep(0.01)
    done = await client.completions.create(model="faq", prompt="Use", max_tokens=10, temperature=1, seed=1)
    assert done.choices[0].finish_reason
    assert len(begun) < 100, "the answer did not wait for all texts"
    assert len((await embedding).data) == 100


async def test_a_client_that_goes_away_ends_its_embedding(server: HttpServer, hub: Hub, model: Make) -> None:
    begun: list[int] = []
    hub.swap(slow_embedding(model(), 0.02, begun))
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as http:
        ask = asyncio.create_task(http.post("/embeddings", json={"model": "faq", "input": ["a"] * 500}))
        while not begun:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)
        ask.cancel()
        await asyncio.gather(ask, return_exceptions=True)
    so_far = 0
    while len(begun) > so_far:
        so_far = len(begun)
        await asyncio.sleep(0.2)
    assert so_far < 400, "it did not go on to the end"


async def test_it_ends_when_its_time_is_over(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(slow_embedding(model(), 0.05, []))
    with pytest.raises(openai.APIStatusError) as caught:
        await client.embeddings.create(model="faq", input=["a"] * 50, extra_body={"timeout_s": 0.2})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


async def test_a_full_queue_refuses(hub: Hub, store: Any, model: Make) -> None:
    hub.swap(slow_embedding(model(), 0.02, []))
    answering = Answering(hub, store)
    asks = [answering.embed("faq", ["a"], None) for _ in range(80)]
    found = await asyncio.gather(*asks, return_exceptions=True)
    refused = [error for error in found if isinstance(error, BaseException)]
    assert 0 < len(refused) < 20
    assert all(isinstance(error, EbbflowError) and error.reason is Reason.QUEUE_FULL for error in refused)
