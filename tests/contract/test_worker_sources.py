"""Distillations that learn from more than a corpus: private texts, a population, adapter updates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import tiny_models
import torch
from distillation_world import add_student, job_of, queue, release_of, sha256_of, worker_of
from google.protobuf import json_format

from ebbflow.api.v1 import distillation_pb2, feedback_pb2, population_pb2, round_pb2
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.distillation import private_training
from ebbflow.cloud.distillation.endings import Stopping
from ebbflow.cloud.distillation.preparation import Order, prepare
from ebbflow.cloud.processes.gate import Gate
from ebbflow.cloud.processes.work import propose
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    DistillationState,
    Population,
    PopulationState,
    Release,
    Round,
    RoundState,
)
from ebbflow.cloud.release import gate, keys, publish, repository
from ebbflow.common.codes.twin import load_weights
from ebbflow.common.privacy import adapters
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.lora import signs
from ebbflow.common.trust.manifest import Manifest

PRIVATE = {
    "epsilon": 8.0,
    "delta": 1e-5,
    "steps": 3,
    "batch_size": 40,
    "corpus_size": 40,  # every text in every step: quick to account for
    "learning_rate": 1e-3,
}
WORD = "zyzzyva"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def private_lines(count: int = 40) -> list[bytes]:
    texts = [f"the {WORD} number {number} is sold" for number in range(count)]
    return [json.dumps({"topic": "secret", "text": text}).encode() + b"\n" for text in texts]


def private_fields(blobs: LocalBlobStore, lines: list[bytes] | None = None, **changes: Any) -> dict[str, Any]:
    training = distillation_pb2.PrivateTraining(**{**PRIVATE, **changes})
    sha256 = blobs.put(private_lines() if lines is None else lines).sha256
    return {"private_corpus_sha256": sha256, "private_training": json_format.MessageToDict(training)}


def weights_of(release: Release, blobs: LocalBlobStore, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / f"weights{release.number}"
    blobs.fetch(sha256_of(release, "bf16"), path)
    return {name: tensor.float() for name, tensor in load_weights(path).state_dict().items()}


def judge(registry: Registry, blobs: LocalBlobStore, folder: Path, times: int) -> None:
    """Lets distiller and gate sign what is packed."""
    keys.create(folder / "keys")
    with registry.transaction() as session:
        repository.initialise(session, folder / "keys", clock.now())
    limits = gate.Limits(regression=9.0, precision_loss=9.0)
    keeper = Gate(registry, blobs, keys.load(folder / "keys", "gate"), limits, folder / "gate")
    for _ in range(times):
        propose(registry, keys.load(folder / "keys", "distiller"))
        assert keeper.run_once()
        with registry.transaction() as session:
            assert publish.publish(session, keys.load(folder / "keys", "online"))


def test_a_run_on_private_texts_puts_its_epsilon_on_the_card_of_its_release_and_of_those_after_it(
    registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    text_alone = {"kl_weight": 0.0}
    queue(registry, "one", recipe=text_alone, feedback_epsilon=2.0, **private_fields(blobs))
    queue(registry, "two", recipe={**text_alone, "steps": 0}, base_release=1, **private_fields(blobs, rank=2))
    queue(registry, "three", recipe=text_alone, base_release=2)
    worker = worker_of(registry, blobs, tmp_path)
    assert all(worker.run_once() for _ in range(3))
    jobs = [job_of(registry, job_id) for job_id in ("one", "two", "three")]
    assert [(job.state, job.error) for job in jobs] == [(DistillationState.SUCCEEDED, "")] * 3
    assert [job.step for job in jobs] == [9, 3, 6]
    training = json_format.ParseDict(jobs[0].private_training, distillation_pb2.PrivateTraining())
    assert 7.8 < training.pld_epsilon <= 8.0
    assert training.prv_epsilon == pytest.approx(training.pld_epsilon, abs=0.05)
    assert training.noise_multiplier > 0.3
    judge(registry, blobs, tmp_path, 3)
    cards = [release_of(registry, number).card for number in (1, 2, 3)]
    epsilons = [card["trainingEpsilon"] for card in cards]
    assert epsilons[0] == training.pld_epsilon
    assert 1.3 * training.pld_epsilon < epsilons[1] < 1.6 * training.pld_epsilon, "composed, and not merely added up"
    assert epsilons[2] == epsilons[1]
    assert [card["trainingDelta"] for card in cards] == [1e-5] * 3
    assert cards[0]["feedbackEpsilon"] == 2.0


def test_private_texts_shape_neither_tokenizer_nor_probe_nor_what_the_gate_measures(
    sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    queue(sqlite_registry, "with", recipe={"kl_weight": 0.0}, **private_fields(blobs))
    queue(sqlite_registry, "without", recipe={"kl_weight": 0.0})
    worker = worker_of(sqlite_registry, blobs, tmp_path)
    assert worker.run_once()
    assert worker.run_once()
    first, second = release_of(sqlite_registry, 1), release_of(sqlite_registry, 2)
    assert sha256_of(first, "tokenizer") == sha256_of(second, "tokenizer")
    manifests = [json.loads(blobs.read(sha256_of(release, "manifest"))) for release in (first, second)]
    assert manifests[0]["probe"]["token_ids"] == manifests[1]["probe"]["token_ids"]
    assert sha256_of(first, "bf16") != sha256_of(second, "bf16")
    assert not list((tmp_path / "work").iterdir()), "no checkpoint stays behind"


@pytest.mark.parametrize("count", [0, 1])
def test_a_corpus_of_no_private_texts_is_trained_on_like_any_other(
    count: int, sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    queue(sqlite_registry, recipe={"kl_weight": 0.0}, **private_fields(blobs, private_lines(count)))
    assert worker_of(sqlite_registry, blobs, tmp_path).run_once()
    job = job_of(sqlite_registry)
    assert (job.state, job.error) == (DistillationState.SUCCEEDED, "")


def test_all_private_texts_are_trained_on_whatever_their_split(
    sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    """To set some aside for the gate would make one text's place hang on how many others there are."""
    lines = [
        line.replace(b"}", b', "split": "%s"}' % split) for line in private_lines(10) for split in (b"gate", b"train")
    ]
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    queue(sqlite_registry, recipe={"kl_weight": 0.0}, **private_fields(blobs, lines))
    with sqlite_registry.reading() as session:
        order = Order.read(session, job_of(sqlite_registry))
    run = prepare(order, blobs, tmp_path, "float32")
    begun = run.trainer._go_private()  # type: ignore[union-attr]
    assert len(begun._documents) == 20


@pytest.mark.parametrize("stop_at", [2, 6, 8])
def test_a_private_run_that_stops_goes_on_elsewhere_without_a_repeated_step(
    stop_at: int, sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    advance = private_training.PrivateTrainer.advance

    def note(trainer: private_training.PrivateTrainer) -> Any:
        progress = advance(trainer)
        taken.append(progress.step)
        return progress

    monkeypatch.setattr(private_training.PrivateTrainer, "advance", note)
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    queue(sqlite_registry, recipe={"kl_weight": 0.0}, **private_fields(blobs))
    steps = iter([*[False] * (stop_at - 1), True])
    with pytest.raises(Stopping):
        worker_of(sqlite_registry, blobs, tmp_path, stopping=lambda: next(steps)).run_once()
    assert worker_of(sqlite_registry, blobs, tmp_path, name="other").run_once()
    job = job_of(sqlite_registry)
    assert (job.state, job.error, job.step) == (DistillationState.SUCCEEDED, "", 9)
    assert taken == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sequence_length": 65}, "private_training.sequence_length"),
        ({"epsilon": 0.05, "steps": 100_000, "delta": 1e-15}, "epsilon"),
        ({"batch_size": 41}, "private_training.batch_size"),
    ],
)
def test_an_impossible_private_order_fails_before_its_first_step(
    changes: dict[str, Any], word: str, sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    queue(sqlite_registry, recipe={"kl_weight": 0.0}, **private_fields(blobs, **changes))
    assert worker_of(sqlite_registry, blobs, tmp_path).run_once()
    job = job_of(sqlite_registry)
    assert (job.state, job.step) == (DistillationState.FAILED, 0)
    assert word in job.error
    assert WORD not in job.error


def test_private_texts_that_are_gone_end_the_distillation_in_words_that_do_not_name_their_hash(
    sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    fields = private_fields(blobs)
    queue(sqlite_registry, recipe={"kl_weight": 0.0}, **fields)
    blobs.delete(fields["private_corpus_sha256"])
    assert worker_of(sqlite_registry, blobs, tmp_path).run_once()
    job = job_of(sqlite_registry)
    assert (job.state, job.step) == (DistillationState.FAILED, 0)
    assert "order the distillation again with the file" in job.error
    assert fields["private_corpus_sha256"] not in job.error


def add_population(registry: Registry, prompts: list[str], generation: int = 1) -> None:
    made = [
        population_pb2.Prompt(prompt_id=f"{generation}-{number}", text=text, topic="sea", weight=1 + number)
        for number, text in enumerate(prompts)
    ]
    row = Population(
        student_id="faq",
        generation=generation,
        state=PopulationState.READY,
        settings={},
        round_id=None,
        create_time=clock.now(),
        prompts=[json_format.MessageToDict(prompt) for prompt in made],
    )
    with registry.transaction() as session:
        session.add(row)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.25), (0.6, 0.6), (1.0, 1.0)])
def test_a_population_gets_its_share_of_the_tokens(
    share: float, expected: float, sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    prompts = ["when does the tide turn", "how salt is the sea"]
    add_population(sqlite_registry, prompts)
    queue(sqlite_registry, recipe={"kl_weight": 0.0, "steps": 800}, population=1, population_share=share)
    with sqlite_registry.reading() as session:
        order = Order.read(session, job_of(sqlite_registry))
    sequences = prepare(order, blobs, tmp_path, "float32").trainer._sequences  # type: ignore[union-attr]
    lengths = np.diff(sequences._documents.starts)[sequences._drawn]
    topics = [sequences._documents.topics[number] for number in sequences._drawn]
    prompt_tokens = sum(int(n) for n, topic in zip(lengths, topics, strict=True) if topic not in tiny_models.TOPICS)
    assert prompt_tokens / lengths.sum() == pytest.approx(expected, abs=0.02)


def test_another_population_is_another_run(sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    add_population(sqlite_registry, ["when does the tide turn"])
    add_population(sqlite_registry, ["when does the wind turn"], generation=2)
    prints = set[str]()
    for fields in ({}, {"population": 1}, {"population": 2}, {"population": 2, "population_share": 0.5}):
        job_id = f"job{len(prints)}"
        queue(sqlite_registry, job_id, recipe={"kl_weight": 0.0}, **fields)
        job = job_of(sqlite_registry, job_id)
        job.id = "same"
        with sqlite_registry.reading() as session:
            order = Order.read(session, job)
        prints.add(order.fingerprint(order.recipe("float32")))
    assert len(prints) == 4


def test_the_average_of_an_adapter_round_is_added_to_the_release_that_it_changes(
    sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    queue(sqlite_registry, "base", recipe={"kl_weight": 0.0})
    worker = worker_of(sqlite_registry, blobs, tmp_path)
    assert worker.run_once()
    before = weights_of(release_of(sqlite_registry, 1), blobs, tmp_path)
    shape = add_adapter_round(sqlite_registry, blobs)
    queue(sqlite_registry, "changed", recipe={"steps": 0}, base_release=1, adapter_round_id="adapt")
    assert worker.run_once()
    job = job_of(sqlite_registry, "changed")
    assert (job.state, job.error, job.step) == (DistillationState.SUCCEEDED, "", 0)
    after = weights_of(release_of(sqlite_registry, 2), blobs, tmp_path)
    for name, tensor in before.items():
        slot = shape.get(name.removesuffix(".weight"))
        if slot is None:
            assert torch.equal(after[name], tensor)
        else:
            up = torch.full((slot.outputs, 2), 0.01)
            torch.testing.assert_close(
                after[name], tensor + up @ signs(7, slot.name, 2, slot.inputs), rtol=0, atol=2e-3
            )
            assert not torch.equal(after[name], tensor)


def add_adapter_round(registry: Registry, blobs: LocalBlobStore) -> dict[str, adapters.Slot]:
    """A closed round whose average is 0.01 in every value; returns the layers that it changes."""
    with registry.reading() as session:
        release = session.get_one(Release, ("faq", 1))
    config = StudentConfig.from_hf(dict(Manifest.from_json(blobs.read(sha256_of(release, "manifest"))).config))
    slots = adapters.slots(config, ["q_proj", "v_proj"], 2)
    dimension = slots[-1].end
    plan = feedback_pb2.RoundPlan(
        round="rounds/adapt",
        student="students/faq",
        adapter=feedback_pb2.AdapterPlan(
            release=1, seed=7, rank=2, modules=["q_proj", "v_proj"], dimension=dimension, clip_norm=100.0, scale=100
        ),
        policy=feedback_pb2.PrivacyPolicy(epsilon=4.0),
    )
    average = blobs.put([np.full(dimension, 0.01, "<f4").tobytes()])
    aggregate = round_pb2.Aggregate(
        informative=True,
        adapter=round_pb2.AdapterAggregate(blob_sha256=bytes.fromhex(average.sha256), release=1, agents=9),
    )
    row = Round(
        id="adapt",
        student_id="faq",
        state=RoundState.CLOSED,
        plan=plan.SerializeToString(),
        signature=b"",
        key_id="",
        window="2026-01-01",
        end_time=clock.now(),
        create_time=clock.now(),
        aggregate=json_format.MessageToDict(aggregate),
    )
    with registry.transaction() as session:
        session.add(row)
    return {slot.name: slot for slot in slots}


def test_a_round_that_is_gone_ends_the_distillation_with_its_name(
    sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    queue(sqlite_registry, recipe={"kl_weight": 0.0}, adapter_round_id="lost")
    assert worker_of(sqlite_registry, blobs, tmp_path).run_once()
    assert "rounds/lost" in job_of(sqlite_registry).error
    with sqlite_registry.reading() as session:
        assert not session.scalars(sa.select(Release)).all()
