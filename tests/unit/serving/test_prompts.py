"""Prompts become their tokens, and one that can never fit costs next to nothing."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.serving.guards import MAX_BODY_BYTES
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.prompts import prompt_tokens

Make = Callable[..., Model]


@example("", 0)
@example("How do I read a file in Python? Use open() in a with block. " * 20, 0)
@example(" " * 9000, 0)
@given(st.text(max_size=40), st.integers(0, 200))
def test_a_prompt_becomes_its_tokens_or_is_too_long(one_engine: Model, text: str, repeats: int) -> None:
    text *= 1 + repeats
    expected = one_engine.tokenizer.encode(text, bos=True)
    if len(expected) < 512:
        assert prompt_tokens(one_engine, text, room=1) == expected
    else:
        with pytest.raises(EbbflowError) as caught:
            prompt_tokens(one_engine, text, room=1)
        assert caught.value.reason is Reason.CONTEXT_TOO_LONG


def test_a_long_text_of_few_tokens_fits(one_engine: Model) -> None:
    """More than sixteen characters to a token: the beginning alone says nothing."""
    tokenizer = Tokenizer.train(["-" * 64] * 8, 300)
    model = Model("students/faq", "students/faq/releases/1", one_engine.engine, tokenizer)
    text = "-" * 64 * 300
    assert len(tokenizer.encode(text)) < 512
    assert prompt_tokens(model, text, room=1) == tokenizer.encode(text, bos=True)


@given(st.lists(st.integers(-5, 400), max_size=20))
def test_tokens_are_the_students_or_refused(one_engine: Model, token_ids: list[int]) -> None:
    vocabulary = one_engine.engine.config.vocab_size
    if token_ids and all(0 <= token < vocabulary for token in token_ids):
        assert prompt_tokens(one_engine, token_ids, room=1) == token_ids
    else:
        with pytest.raises(EbbflowError) as caught:
            prompt_tokens(one_engine, token_ids, room=1)
        assert caught.value.reason is Reason.INVALID_REQUEST


async def test_the_longest_prompt_holds_nobody_up(
    client: openai.AsyncOpenAI, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    """Three megabytes are refused in less than what tokenising them takes, beside an answer that goes on."""
    hub.swap(one := slow(model()))
    text = "hello world " * (MAX_BODY_BYTES // 16)
    began_s = time.process_time()
    one.tokenizer.encode(text[: len(text) // 16])
    whole_s = 16 * (time.process_time() - began_s)
    running = asyncio.create_task(client.completions.create(model="faq", prompt="Use", max_tokens=100, seed=1))
    asks: list[Any] = [client.completions.create(model="faq", prompt=text, max_tokens=1) for _ in range(3)]
    began_s = time.process_time()
    found = await asyncio.gather(*asks, return_exceptions=True)
    assert time.process_time() - began_s < 2 * whole_s, "three of them, with their bodies and the answer beside them"
    assert all(isinstance(error, openai.BadRequestError) for error in found)
    assert {error.code for error in found if isinstance(error, openai.BadRequestError)} == {"context_length_exceeded"}
    assert (await running).choices[0].finish_reason
