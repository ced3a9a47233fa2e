"""Several prompts, several answers to one, prompts as tokens, and the prompt repeated."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model

Make = Callable[..., Model]


async def test_every_choice_is_what_it_would_be_alone(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    ask: dict[str, Any] = {"model": "faq", "max_tokens": 20, "temperature": 1.2}
    prompts = ["Use open()", "How do I"]
    alone = [
        (await client.completions.create(**ask, prompt=prompt, seed=seed)).choices[0].text
        for prompt in prompts
        for seed in (5, 6)
    ]
    together = await client.completions.create(**ask, prompt=prompts, n=2, seed=5)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    stream = await client.completions.create(
        **ask, prompt=prompts, n=2, seed=5, stream=True, stream_options={"include_usage": True}
    )
    texts, ends = ["", "", "", ""], set()
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends |= {choice.index} if choice.finish_reason else set()
        usage = chunk.usage
    assert texts == alone
    assert ends == {0, 1, 2, 3}
    assert usage == together.usage


async def test_a_prompt_counts_once_for_all_its_choices(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, store: FeedbackStore
) -> None:
    hub.swap(one := model())
    done = await client.chat.completions.create(
        model="faq", messages=[{"role": "user", "content": "Hi"}], n=3, max_tokens=5, seed=1
    )
    prompt = one.tokenizer.encode("User: Hi\nAssistant:", bos=True)
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(prompt)
    ids = [choice.model_extra["interaction_id"] for choice in done.choices if choice.model_extra]
    assert ids[0] == done.id
    assert len(set(ids)) == 3
    for id_ in ids:
        await client.post("/feedback", body={"id": id_, "outcome": "accepted"}, cast_to=object)
    assert store.count() == (3, 1)


async def test_tokens_are_taken_as_they_are(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    tokens = one.tokenizer.encode("Grüße 🦊", bos=True)
    ask: dict[str, Any] = {"model": "faq", "max_tokens": 12, "seed": 4}
    text = await client.completions.create(**ask, prompt="Grüße 🦊")
    same = await client.completions.create(**ask, prompt=tokens)
    assert same.choices[0].text == text.choices[0].text
    assert same.usage == text.usage
    several = await client.completions.create(**ask, prompt=[tokens, tokens[:3]])
    assert several.choices[0].text == text.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_comes_before_the_answer(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, *, stream: bool
) -> None:
    hub.swap(one := model())
    ask: dict[str, Any] = {"model": "faq", "max_tokens": 8, "seed": 4}
    plain = (await client.completions.create(**ask, prompt="Use 🦊")).choices[0].text
    for prompt in ("Use 🦊", one.tokenizer.encode("Use 🦊")):
        found: Any = await client.completions.create(**ask, prompt=prompt, echo=True, stream=stream)
        chunks = [chunk async for chunk in found] if stream else [found]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert text.startswith("Use 🦊")
        assert isinstance(prompt, list) or text == "Use 🦊" + plain


async def test_one_that_is_refused_refuses_all(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="faq", prompt=["short", "日本語" * 400], max_tokens=400)
    assert caught.value.code == "context_length_exceeded"
    deadline_s = time.monotonic() + 60
    while hub.batcher("").load().running:
        assert time.monotonic() < deadline_s, "the others are cancelled"
        await asyncio.sleep(0.01)


async def test_penalties_and_bias_change_the_answer_as_they_say(
    client: openai.AsyncOpenAI, hub: Hub, model: Make
) -> None:
    hub.swap(one := model())
    ask: dict[str, Any] = {"model": "faq", "prompt": "Use", "max_tokens": 30, "temperature": 0, "logprobs": 0}
    letter = one.tokenizer.encode("x")[0]
    forced = await client.completions.create(**ask, logit_bias={str(letter): 100})
    assert forced.choices[0].text == "x" * 30
    penalised = await client.completions.create(**ask, logit_bias={str(letter): 20}, frequency_penalty=2)
    assert 0 < penalised.choices[0].text.count("x") < 30
    repeated = await client.completions.create(**ask, extra_body={"repetition_penalty": 10.0, "min_p": 0.5})
    tokens = repeated.choices[0].logprobs.tokens if repeated.choices[0].logprobs else None
    assert tokens
    assert len(set(tokens)) > 20, "hardly any token comes twice"
