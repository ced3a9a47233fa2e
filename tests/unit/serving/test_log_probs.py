"""Log-probabilities are the engine's, token by token, whatever the sampling and wherever the answer is cut."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ebbflow.edge.engine.base import StepEntry
from ebbflow.edge.serving.generation import Generation
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.meters import NoMeters
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.scheduler import Scheduler
from ebbflow.edge.serving.sequences import Event, Finished, Piece

Make = Callable[..., Model]


def answer(model: Model, prompt: str, sampling: Sampling) -> tuple[Piece, list[int], Finished]:
    """Returns the answer, its tokens and its end."""
    events: list[Event] = []
    generation = Generation(model, prompt, sampling, events.append)
    begin = len(generation.token_ids)
    scheduler = Scheduler(model, Limits(), NoMeters())
    scheduler.submit(generation, 0.0)
    while scheduler.admit(0.0):
        scheduler.settle(scheduler.step(0.0), 0.0)
    end = events[-1]
    assert isinstance(end, Finished)
    pieces = [event for event in events if isinstance(event, Piece)]
    return Piece.joined(pieces), list(generation.token_ids[begin:]), end


def log_softmax(model: Model, prompt: str, token_ids: Sequence[int]) -> np.ndarray:
    """The engine's log-probabilities of every token at the places of the answer's, [T, V], in one pass."""
    tokens = [*model.tokenizer.encode(prompt, bos=True), *token_ids]
    slot = model.engine.open()
    logits_TV = model.engine.step([StepEntry(slot, tokens[:-1], "all")])[0].astype(np.float64)
    model.engine.close(slot)
    logits_TV = logits_TV[-len(token_ids) :]
    log_probs_TV: np.ndarray = logits_TV - np.logaddexp.reduce(logits_TV, axis=1)[:, None]
    return log_probs_TV


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_they_are_the_engines_before_temperature_and_penalties(model: Make, temperature: float) -> None:
    one = model()
    options: dict[str, Any] = {"frequency_penalty": 1.0, "top_k": 40, "logit_bias": ((70, 5.0),)}
    sampling = Sampling(max_tokens=40, temperature=temperature, seed=5, top_log_probs=3, **options)
    piece, token_ids, _ = answer(one, "How do I", sampling)
    told = [chance.token_id for chance in piece.chances]
    assert told == token_ids[: len(told)]
    assert len(token_ids) - len(told) <= 1, "all but what ends a text"
    expected_TV = log_softmax(one, "How do I", token_ids)
    for chance, row_V in zip(piece.chances, expected_TV, strict=False):
        assert chance.log_prob == pytest.approx(row_V[chance.token_id], abs=2e-4)
        likeliest = np.sort(row_V)[::-1][:3]
        assert [other.log_prob for other in chance.top] == pytest.approx(likeliest, abs=2e-4)


@settings(max_examples=40)
@example(1, "")
@given(st.integers(0, 10**6), st.text(min_size=0, max_size=2))
def test_tokens_and_text_agree_and_change_nothing(one_engine: Model, seed: int, stop: str) -> None:
    """Stop texts cut tokens off with their text, and half characters lose none."""
    sampling = Sampling(max_tokens=30, temperature=2.0, seed=seed, stop=(stop,) if stop else ())
    plain, _, plain_end = answer(one_engine, "Use", sampling)
    told, _, end = answer(one_engine, "Use", Sampling(**{**vars(sampling), "top_log_probs": 0}))
    assert (told.text, end) == (plain.text, plain_end)
    whole = b"".join(chance.token for chance in told.chances)
    assert whole.decode(errors="replace").startswith(told.text.rstrip("\N{REPLACEMENT CHARACTER}"))
    if end.reason.value == "length":
        assert len(told.chances) == end.completion_tokens
    without_last = b"".join(chance.token for chance in told.chances[:-1]).decode(errors="ignore")
    assert not told.chances or len(without_last) <= len(told.text), "no token that lies behind the cut"


async def test_completions_have_openais_arrays(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    ask: dict[str, Any] = {"model": "faq", "prompt": "Use open()", "max_tokens": 30, "seed": 2, "logprobs": 3}
    whole = await client.completions.create(**ask)
    choice = whole.choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.tokens
    assert found.token_logprobs
    assert found.top_logprobs
    assert found.text_offset
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    for token, log_prob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == log_prob <= 0
        assert 3 <= len(top) <= 4 or "bytes" in str(top)
        assert sum(math.exp(value) for value in top.values()) <= 1 + 1e-4
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        near = choice.text[offset : offset + len(token) + 9]  # bytes before it may yet become characters
        assert token.startswith("bytes:") or token in near
    assert found.text_offset == sorted(found.text_offset)
    chunks = [chunk async for chunk in await client.completions.create(**ask, stream=True)]
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens or []] == found.tokens
    assert [offset for part in parts for offset in part.text_offset or []] == found.text_offset
    none = await client.completions.create(**{**ask, "logprobs": 0})
    assert none.choices[0].logprobs is not None
    assert none.choices[0].logprobs.tokens == found.tokens
    assert none.choices[0].logprobs.top_logprobs is None


async def test_chats_have_openais_objects(client: openai.AsyncOpenAI, hub: Hub, model: Make) -> None:
    hub.swap(model())
    ask: dict[str, Any] = {"model": "faq", "max_tokens": 20, "seed": 7, "logprobs": True, "top_logprobs": 2}
    ask["messages"] = [{"role": "user", "content": "Grüße 🦊"}]
    whole = await client.chat.completions.create(**ask)
    found = whole.choices[0].logprobs
    assert found is not None
    assert found.content
    for entry in found.content:
        assert entry.bytes is not None
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.token.startswith("bytes:") or entry.token.encode() == bytes(entry.bytes)
    text = b"".join(bytes(entry.bytes or []) for entry in found.content).decode(errors="replace")
    assert text.strip() == (whole.choices[0].message.content or "").strip()
    chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [entry.logprob for part in parts for entry in part.content or []] == [e.logprob for e in found.content]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{**ask, "logprobs": False})
    assert caught.value.param == "top_logprobs"


def test_an_alternative_has_none_of_its_own(model: Make) -> None:
    piece, _, _ = answer(model(), "a", Sampling(max_tokens=2, top_log_probs=20))
    others = [other for chance in piece.chances for other in chance.top]
    assert len(others) == 20 * len(piece.chances)
    assert not any(other.top for other in others)
