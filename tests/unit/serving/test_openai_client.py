"""The HTTP API as the real `openai` client sees it."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model

Make = Callable[..., Model]


async def test_models_lists_what_serves(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    assert [entry async for entry in client.models.list()] == []
    hub.swap(model())
    assert [entry.id async for entry in client.models.list()] == ["faq"]
    assert (await client.models.retrieve("faq")).owned_by == "ebbflow"


async def test_completion_names_release_and_counts_tokens(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, tokenizer: object
) -> None:
    hub.swap(one := model())
    done = await client.completions.create(model="faq", prompt="How do I", max_tokens=9, temperature=0, user="ada")
    assert done.model == "students/faq/releases/1"
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(one.tokenizer.encode("How do I", bos=True))
    assert done.usage.completion_tokens <= 9
    assert done.choices[0].finish_reason in {"stop", "length"}


async def test_stream_gives_the_same_text_as_the_whole_answer(
    client: openai.AsyncOpenAI, hub: Hub, model: Make
) -> None:
    hub.swap(model())
    ask: dict[str, Any] = {"model": "faq", "prompt": "Use open()", "max_tokens": 40, "seed": 5, "temperature": 1.3}
    whole = await client.completions.create(**ask)
    stream = await client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


async def test_chat_streams_role_text_and_end(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello 🦊"}]
    ask: dict[str, Any] = {"model": "faq", "messages": messages, "max_completion_tokens": 30, "seed": 1}
    whole = await client.chat.completions.create(**ask)
    chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


async def test_answers_do_not_depend_on_their_neighbours(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())

    async def ask(seed: int) -> str:
        done = await client.completions.create(model="faq", prompt=f"Question {seed}", max_tokens=25, seed=seed)
        return done.choices[0].text

    alone = [await ask(seed) for seed in range(12)]
    together = await asyncio.gather(*(ask(seed) for seed in range(12)))
    assert together == alone


async def test_feedback_is_kept_by_the_answers_id(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, store: FeedbackStore
) -> None:
    hub.swap(model())
    done = await client.completions.create(model="faq", prompt="Use open()", max_tokens=5, user="ada")
    body = {"id": done.id, "outcome": "accepted"}
    assert await client.post("/feedback", body=body, cast_to=object) == {"object": "feedback", **body}
    with pytest.raises(openai.NotFoundError):
        await client.post("/feedback", body={"id": "nothing", "outcome": "edited"}, cast_to=object)
    with pytest.raises(openai.BadRequestError):
        await client.post("/feedback", body={"id": done.id, "outcome": "loved"}, cast_to=object)


async def test_a_full_disk_costs_the_record_and_not_the_answer(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, store: FeedbackStore
) -> None:
    hub.swap(model())
    with store._relaxed.reading() as connection:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size: nothing more fits
    prompt = "How do I read a file? " * 15
    for _ in range(20):
        done = await client.completions.create(model="faq", prompt=prompt, max_tokens=2)
        assert done.choices[0].finish_reason
    assert store.count()[0] < 20
