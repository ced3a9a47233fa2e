"""Generations with real teachers: one that can vary prompts and one that cannot."""

import random
from pathlib import Path

import numpy as np
import population_world as world
import pytest
import torch

from ebbflow.api.v1.population_pb2 import Population
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.evolving import Evolver
from ebbflow.cloud.distillation.likeness import by_words
from ebbflow.cloud.distillation.variation import TeacherVariator
from ebbflow.cloud.feedback import generation
from ebbflow.cloud.feedback.evolution import Votes
from ebbflow.cloud.feedback.generation import Order, Wish
from ebbflow.cloud.feedback.pool import Pool, Space
from ebbflow.cloud.feedback.variations import Judge, Verdict
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import PopulationState
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.common.student.tokens import Tokenizer

EVERYTHING = [text for topic in world.GRAMMAR for text in world.sentences(topic)]
KINDS = ("freeze my credit card", "check my balance", "cancel the train seat")
ASKED = [text for text in EVERYTHING if any(kind in text for kind in KINDS)]
"""What users ask: three kinds of requests out of 72."""
PUBLIC = {topic: [text for text in found if text not in ASKED] for topic, found in world.public_texts().items()}
"""Public texts, none of them of a kind that users ask."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has seen more than is public."""
    return world.save_teacher(tmp_path_factory.mktemp("able"), EVERYTHING, 120)


@pytest.fixture(scope="module")
def pool() -> Pool:
    texts = [Text(topic, text, "train") for topic, found in PUBLIC.items() for text in found]
    public = [text.text for text in texts]
    return Pool(texts, Space(by_words(public), public).rows(public))


@pytest.fixture(scope="module")
def space(pool: Pool) -> Space:
    public = [text.text for text in pool.texts]
    return Space(by_words(public), public)


def follow(pool: Pool, space: Space, teacher: Path | None, size: int = 24) -> Population:
    before = generation.first(pool, Order(1, size, 0), {})
    votes = Votes(tuple(400.0 if at % 3 == 0 else 5.0 for at in range(size)), (0.0,) * size, 10.0)
    variator = TeacherVariator(Teacher.load(str(teacher))) if teacher else None
    return generation.following(pool, space, Order(2, size, 0), before, votes, variator)


def test_a_teacher_that_can_vary_makes_new_prompts_like_the_winners(pool: Pool, space: Space, able: Path) -> None:
    made = follow(pool, space, able)
    assert (made.method, made.reason) == (Population.METHOD_TEACHER, "")
    assert len(made.prompts) == 24
    public = {text.text for text in pool.texts}
    new = [prompt for prompt in made.prompts if prompt.text not in public]
    assert len(new) >= 6
    assert all(prompt.parent.startswith("1-") for prompt in new)
    before = {prompt.prompt_id: prompt for prompt in generation.first(pool, Order(1, 24, 0), {})}
    likeness = [float(space.rows([prompt.text])[0] @ space.rows([before[prompt.parent].text])[0]) for prompt in new]
    assert np.mean(likeness) > 0.3
    assert sum(prompt.text in EVERYTHING for prompt in new) >= len(new) / 2, "most are whole sentences"
    assert follow(pool, space, able) == made, "the seed decides everything"


def test_a_teacher_that_is_too_weak_is_found_out_and_public_texts_take_its_place(
    pool: Pool, space: Space, tmp_path: Path
) -> None:
    made = follow(pool, space, world.save_teacher(tmp_path, EVERYTHING, 0), 16)
    assert made.method == Population.METHOD_PUBLIC_TEXTS
    assert "the teacher varied 0 of 32 prompts well, and 25% are needed" in made.reason
    assert "without an end or empty" in made.reason
    assert len(made.prompts) == 16
    public = {text.text for text in pool.texts}
    assert all(prompt.text in public for prompt in made.prompts)


def test_variations_are_judged_by_what_public_texts_are_like(pool: Pool, space: Space) -> None:
    public = [text.text for text in pool.texts]
    tokenizer = Tokenizer.train(public, 400)
    judge = Judge(public, pool.rows_NE, tokenizer.encode, tokenizer.size, ["an earlier prompt"])
    parent = "please freeze the loan today"

    def verdict(text: str) -> Verdict:
        return judge.judge(text, space.rows([text])[0], space.rows([parent])[0])

    assert verdict("please freeze my credit card today") is Verdict.GOOD
    assert verdict("") is verdict(" ") is Verdict.EMPTY
    assert verdict(public[0].upper() + "!") is Verdict.COPY
    assert verdict("an earlier prompt") is Verdict.COPY
    assert verdict("loan freeze today the please please qwx") is Verdict.GARBLED
    assert verdict("please freeze freeze freeze freeze freeze freeze freeze today") is Verdict.GARBLED
    assert verdict("help me find a ferry ticket near the sea") is Verdict.ASTRAY
    judge.keep("please freeze my credit card today")
    assert verdict("please freeze my credit card today") is Verdict.COPY


def test_held_out_public_texts_pass_for_probable_and_shuffled_ones_do_not(pool: Pool, space: Space) -> None:
    known = [text.text for text in pool.texts]
    tokenizer = Tokenizer.train(known, 400)
    judge = Judge(known, pool.rows_NE, tokenizer.encode, tokenizer.size)
    fresh = random.Random(0).sample([text for text in EVERYTHING if text not in known], 200)
    shuffled = [" ".join(random.Random(0).sample(text.split(), len(text.split()))) for text in fresh]

    def garbled(texts: list[str]) -> float:
        rows = space.rows(texts)
        found = [judge.judge(text, row_E, row_E) for text, row_E in zip(texts, rows, strict=True)]
        return found.count(Verdict.GARBLED) / len(found)

    assert garbled(fresh) < 0.05
    assert garbled(shuffled) > 0.9


def test_a_teacher_writes_an_empty_text_where_it_finds_no_end(able: Path) -> None:
    variator = TeacherVariator(Teacher.load(str(able)))
    wishes = [Wish(text, "bank", PUBLIC["bank"][:3], "continue") for text in PUBLIC["bank"][:20]]
    assert variator.vary(wishes, 1, 0).count("") >= 15
    written = variator.vary(wishes, 30, 0)
    assert written.count("") <= 2
    assert variator.vary(wishes, 30, 0) == written
    assert variator.vary(wishes, 30, 1) != written


def test_a_worker_makes_a_generation_with_its_students_teacher(
    sqlite_registry: Registry, blobs: LocalBlobStore, able: Path, tmp_path: Path
) -> None:
    world.add_student(sqlite_registry, blobs.put([world.corpus_bytes(PUBLIC)]).sha256, str(able))
    evolver = Evolver(sqlite_registry, blobs, tmp_path / "work", "w", 30.0)
    world.queue(sqlite_registry, size=16)
    assert evolver.run_once()
    name = world.add_round(sqlite_registry, world.bins_of(sqlite_registry, 1), [100.0] * 4 + [1.0] * 12)
    world.queue(sqlite_registry, size=16, round=name, seed=2**64 - 1)
    assert evolver.run_once()
    row = world.generation(sqlite_registry, 2)
    assert (row.state, row.method) == (PopulationState.READY, "METHOD_TEACHER")
    assert row.parents["winners"] == 4
    assert 0 < row.parents["crowding"] < 1


def evolve(pool: Pool, space: Space, teacher: Path, generations: int = 5) -> list[float]:
    """How near each generation is to what users ask, over rounds of 1,500 agents with 20 users at epsilon 8."""
    fleet = world.Fleet(1500, 20, ASKED, random.Random(0))
    variator = TeacherVariator(Teacher.load(str(teacher)))
    prompts = generation.first(pool, Order(1, 32, 0), {})
    found = [world.nearness(space, prompts, ASKED)]
    for number in range(2, generations + 1):
        votes = Votes.of(*fleet.vote(prompts, 8.0))
        prompts = list(generation.following(pool, space, Order(number, 32, number), prompts, votes, variator).prompts)
        found.append(world.nearness(space, prompts, ASKED))
    return found


def test_prompts_come_nearer_to_what_users_ask_over_rounds_with_real_noise(
    pool: Pool, space: Space, able: Path
) -> None:
    """Measured over twelve runs: from 0.556 to 0.592 at least and 0.606 on average.

    With votes that were mixed up to 0.49 on average.
    """
    told = evolve(pool, space, able)
    assert told[-1] > told[0] + 0.01
