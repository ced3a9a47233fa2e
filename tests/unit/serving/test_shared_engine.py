"""What requests share on a real engine: its memory, and the beginnings of their prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.common.errors import EbbflowError
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.engine.base import Logits, StepEntry
from ebbflow.edge.engine.library import find_library
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.serving.generation import Generation
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.meters import NoMeters
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.scheduler import Scheduler
from ebbflow.edge.serving.sequences import Event, Finished, Piece

ENGINES = ["native", "torch"] if find_library() else ["torch"]
SYSTEM = "How do I read a file in Python? Use open() in a with block. " * 3
Load = Callable[..., Model]


@pytest.fixture(params=ENGINES)
def load(request: pytest.FixtureRequest, artefacts: dict[int, Path], tokenizer: Tokenizer) -> Load:
    def make(**options: Any) -> Model:
        engine = load_engine(artefacts[1], request.param, threads=1, **options)
        return Model("students/faq", "students/faq/releases/1", engine, tokenizer)

    return make


def count_steps(model: Model, seen: list[int]) -> None:
    step = model.engine.step

    def counted(entries: Sequence[StepEntry]) -> list[Logits]:
        seen.append(sum(len(entry.token_ids) for entry in entries))
        return step(entries)

    model.engine.step = counted  # type: ignore[method-assign]


def answers(model: Model, prompts: Sequence[str], tokens: int, limits: Limits | None = None) -> list[str]:
    """Asks everything at once and returns the texts."""
    scheduler, found = Scheduler(model, limits or Limits(), NoMeters()), [list[Event]() for _ in prompts]
    for number, (prompt, events) in enumerate(zip(prompts, found, strict=True)):
        ends = ((model.tokenizer.eos_id, -100.0),)
        sampling = Sampling(max_tokens=tokens, temperature=1, seed=number, logit_bias=ends)
        scheduler.submit(Generation(model, prompt, sampling, events.append), 0.0)
    turns = 0
    while scheduler.admit(0.0):
        scheduler.settle(scheduler.step(0.0), 0.0)
        turns += 1
        assert turns < 20_000
    assert all(isinstance(events[-1], Finished) for events in found)
    return ["".join(event.text for event in events if isinstance(event, Piece)) for events in found]


def test_memory_that_does_not_hold_all_costs_time_and_no_answer(load: Load) -> None:
    """Eight answers in memory for about three, among them one that takes most of it."""
    free = load()
    prompts = [f"Question {number}" for number in range(7)] + ["x" * 200]
    expected = answers(free, prompts, 120)
    with pytest.raises(EbbflowError) as caught:
        load(memory_limit_bytes=1)
    config = free.engine.config
    # Native keeps bf16; torch keeps float32, and one layer more while it grows.
    numbers = config.num_hidden_layers + (free.engine.name == "torch")
    token_bytes = (
        2 * numbers * config.num_key_value_heads * config.head_dim * (2 if free.engine.name == "native" else 4)
    )
    tight = load(memory_limit_bytes=int(caught.value.metadata["needed_bytes"]) + 600 * token_bytes)
    seen: list[int] = []
    count_steps(tight, seen)
    assert answers(tight, prompts, 120) == expected
    plain: list[int] = []
    count_steps(free, plain)
    answers(free, prompts, 120)
    assert sum(seen) > sum(plain), "somebody had to begin again: else memory was not short"


def test_a_shared_beginning_is_computed_once(load: Load) -> None:
    """Every token that is not computed is one of the engine's hits, and the answers are those of an empty cache."""
    one, seen = load(), list[int]()
    count_steps(one, seen)
    prompts = [SYSTEM + question for question in ("What is a path?", "Use 🦊", "What is a path?")]
    found = [answers(one, [prompt], 10)[0] for prompt in prompts]
    asked = sum(len(one.tokenizer.encode(prompt, bos=True)) for prompt in prompts)
    hits = one.engine.memory().prefix_hits_tokens
    assert sum(seen) + hits == asked + 3 * 9
    assert (hits >= 96) == (one.engine.name == "native")
    assert found == [answers(load(), [prompt], 10)[0] for prompt in prompts]


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3)), min_size=1, max_size=12))
def test_whatever_was_asked_before_changes_no_answer(one_engine: Model, asked: list[tuple[int, int]]) -> None:
    prompts = [SYSTEM[:length] + "?" * tail or "?" for length, tail in asked]
    together = answers(one_engine, prompts, 6, Limits(running=4, queued=20, prompt_tokens=7))
    again = answers(one_engine, prompts, 6, Limits(running=1, queued=20))
    assert together == again


@pytest.mark.parametrize("way", ["http", "grpc"])
async def test_a_purge_leaves_no_prompt_in_the_engines_cache(
    client: openai.AsyncOpenAI, stub: Any, hub: Hub, load: Load, way: str
) -> None:
    hub.swap(one := load())
    await client.completions.create(model="faq", prompt=SYSTEM, max_tokens=1, user="ada")
    kept = hub.batcher("faq").between_steps(lambda engine: engine.memory().cache_bytes).result(60)
    assert (kept > 0) == (one.engine.name == "native")
    if way == "http":
        await client.delete("/feedback/users", cast_to=object, options={"params": {"user": "ada"}})
    else:
        await stub.PurgeUser(pb.PurgeUserRequest(user_key="ada"))
    hub.batcher("faq").between_steps(lambda engine: None).result(60)
    assert one.engine.memory().cache_bytes == 0
    await client.completions.create(model="faq", prompt=SYSTEM, max_tokens=1, user="ben")
    assert one.engine.memory().prefix_hits_tokens == 0


async def test_the_system_prompt_of_chats_is_shared(client: openai.AsyncOpenAI, hub: Hub, load: Load) -> None:
    hub.swap(one := load())
    for question in ("What?", "Why?"):
        messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        await client.chat.completions.create(model="faq", messages=messages, max_tokens=4)
    assert (one.engine.memory().prefix_hits_tokens >= 96) == (one.engine.name == "native")
