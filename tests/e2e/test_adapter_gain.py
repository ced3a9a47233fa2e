"""Updates of real devices make a student better at what their users ask, where noise leaves them a signal.

Everything is real but the network: stores, training, ledger, noise, checks, aggregation and merge.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import adapter_world
import pytest
import tiny_models
import torch
from feedback_world import NOW, SIGNER

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.feedback import adapters, batches, round_rows, rounds
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment, Student
from ebbflow.common.codes.artefact import write_variant
from ebbflow.common.codes.twin import load_weights
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity import keys as identity
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student as Model
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.agent.updates import Updates
from ebbflow.edge.delivery.files import SignedFile
from ebbflow.edge.delivery.slots import FILE_NAMES, Slot, Slots, SlotStore
from ebbflow.edge.feedback.adapters import sequence_losses
from ebbflow.edge.feedback.plans import Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore

pytestmark = pytest.mark.slow

AGENTS, USERS = 5, 20
SETTINGS = round_pb2.AdapterSettings(users_per_agent=USERS, clip_norm=3.0)
WEAK, STRONG = 8.0, 0.5


def text(topic: str, rng: random.Random) -> str:
    return " and ".join(rng.choices(tiny_models.TOPICS[topic], k=3)) + "."


class Release(NamedTuple):
    """A student that knows the sea and the sky, and nothing of the land."""

    weights: Path
    tokenizer: Tokenizer
    config: StudentConfig


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    tokenizer = tiny_models.tokenizer()
    config = StudentConfig(
        vocab_size=tokenizer.size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
    )
    rng, model = random.Random(0), Model.random(config, 1, 0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = [tokenizer.encode(text(rng.choice(["sea", "sky"]), rng), bos=True)[:64] for _ in range(12)]
        optimizer.zero_grad()
        torch.autograd.backward(sequence_losses(model, batch).mean())
        optimizer.step()
    folder = tmp_path_factory.mktemp("release")
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    write_variant(folder / "weights.safetensors", arrays, config, "int8")
    tokenizer.save(folder / "tokenizer.json")
    return Release(folder / "weights.safetensors", tokenizer, config)


def add_fleet(registry: Registry, epsilon: float) -> None:
    with registry.transaction() as session:
        student = Student(
            id="faq",
            teacher="",
            architecture={},
            corpus_sha256="0" * 64,
            topics=[],
            privacy_policy={"epsilon": epsilon, "allowAdapters": True},
            selector="",
            create_time=NOW,
        )
        session.add(student)
        for at in range(AGENTS):
            agent = Agent(id=f"a{at}", state=AgentState.ACTIVE, labels={}, profile={}, create_time=NOW)
            agent.new_device = True
            session.add(agent)
        session.flush()
        for at in range(AGENTS):
            session.add(Assignment(agent_id=f"a{at}", student_id="faq", serving_number=1))


def open_round(registry: Registry, release: Release) -> str:
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        signer = PlanSigner(SIGNER)

        def make(policy: pb.PrivacyPolicy, members: Sequence[object]) -> pb.AdapterPlan:
            return adapters.make_adapter_plan(SETTINGS, 1, release.config, policy, len(members))

        return rounds.open_round(session, student, [], signer, NOW, adapter=make).id


def answer(folder: Path, registry: Registry, blobs: LocalBlobStore, release: Release, agent: str) -> None:
    """One device: twenty users ask about the land, then the round's plan is answered and sent."""
    rng = random.Random(agent)
    store, slots = FeedbackStore(folder / "agent.db"), SlotStore(folder / "releases")
    for user in range(USERS):
        for _ in range(rng.randint(1, 8)):
            store.record_interaction("faq", "students/faq/releases/1", f"u{user}", text("land", rng), "", now=NOW)
    files = dict.fromkeys(FILE_NAMES, SignedFile("0" * 64, 1))
    slots.write("faq", Slots(current=Slot("a", 1, "int8", "", files)))
    (folder / "releases/faq/a").mkdir()
    (folder / "releases/faq/a/weights.safetensors").symlink_to(release.weights)
    (folder / "releases/faq/a/tokenizer.json").symlink_to(release.weights.with_name("tokenizer.json"))
    with registry.reading() as session:
        (plan,) = rounds.signed_plans(session, rounds.waiting_for(session, agent, NOW))
    later = NOW + adapter_world.DAY / 24
    admitted = admit(plan, {SIGNER.public_key.keyid: SIGNER.public_key}, Ceiling(epsilon=64, adapters=True), later)
    key = identity.generate_key()
    changes, base_release = Updates(slots, store).contributions(admitted, lambda: None)
    assert (len(changes), base_release) == (USERS, 1)
    data = store.release_batch(admitted, changes, lambda data: identity.sign(key, data), later, base_release)
    batches.submit(registry, agent, pb.SignedBatch.FromString(data), key.public_key(), later, blobs)
    store.close()


def test_a_weakly_noised_round_improves_the_student_on_texts_that_no_device_had(
    tmp_path: Path, sqlite_registry: Registry, blobs: LocalBlobStore, release: Release
) -> None:
    add_fleet(sqlite_registry, WEAK)
    round_id = open_round(sqlite_registry, release)
    for at in range(AGENTS):
        (tmp_path / f"a{at}").mkdir()
        answer(tmp_path / f"a{at}", sqlite_registry, blobs, release, f"a{at}")
    with sqlite_registry.transaction() as session:
        closed = rounds.close_round(session, round_id, blobs)
        result, plan = round_rows.aggregate_of(closed), round_rows.plan_of(closed)
    adapters.check_usable(result)
    assert (result.adapter.agents, result.limited_batches) == (AGENTS, 0)
    rng = random.Random("held out")
    sought, kept = (
        [release.tokenizer.encode(text(topic, rng), bos=True)[:64] for _ in range(64)] for topic in ("land", "sea")
    )
    before, after = load_weights(release.weights), load_weights(release.weights)
    adapters.apply(after, blobs.read(result.adapter.blob_sha256.hex()), plan.adapter)
    land_before, land_after, sea_before, sea_after = (
        float(sequence_losses(model, texts).mean()) for texts in (sought, kept) for model in (before, after)
    )
    print(f"land {land_before:.3f} -> {land_after:.3f}, sea {sea_before:.3f} -> {sea_after:.3f}")
    print(f"signal to noise {result.adapter.signal_to_noise:.2f}")
    assert land_after < land_before - 0.15
    assert sea_after < sea_before + 0.05


def test_under_a_strict_policy_the_round_is_refused_before_anybody_trains(
    sqlite_registry: Registry, release: Release
) -> None:
    add_fleet(sqlite_registry, STRONG)
    with pytest.raises(EbbflowError) as caught:
        open_round(sqlite_registry, release)
    assert caught.value.reason is Reason.SIGNAL_TOO_WEAK
    assert int(caught.value.metadata["agents_needed"]) > AGENTS
