"""Rounds of adapter updates between real agents and a real cloud."""

import asyncio
import datetime as dt
import importlib.util
import os
import threading
from collections.abc import Sequence

import pytest
from agent_support import alive, enrolled, until
from agent_world import CloudWorld

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback import adapters, cohort, round_rows, rounds
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.vector import layout_of
from ebbflow.edge.agent.background import in_background
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.updates import Updates, tokens_of
from ebbflow.edge.delivery.slots import SlotStore
from ebbflow.edge.feedback.interactions import Interaction

HOUR = dt.timedelta(hours=1)
SETTINGS = round_pb2.AdapterSettings(
    users_per_agent=20, rank=1, modules=["o_proj"], steps=2, batch_size=2, sequence_length=16
)


def open_adapter_round(cloud: CloudWorld, release: int) -> pb.RoundPlan:
    """Opens a round of adapter updates to a release, as the service does."""
    registry, blobs = cloud.cloud.registry, cloud.cloud.blobs
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")

        def make(policy: pb.PrivacyPolicy, members: Sequence[cohort.Member]) -> pb.AdapterPlan:
            config = adapters.config_of(session, blobs, "faq", release)
            return adapters.make_adapter_plan(SETTINGS, release, config, policy, len(members))

        signer = cloud.cloud.plan_signer
        return round_rows.plan_of(rounds.open_round(session, student, [], signer, now(), HOUR, HOUR, adapter=make))


def close(cloud: CloudWorld, plan: pb.RoundPlan) -> round_pb2.Aggregate:
    with cloud.cloud.registry.transaction() as session:
        round_ = rounds.close_round(session, plan.round.removeprefix("rounds/"), cloud.cloud.blobs)
        return round_rows.aggregate_of(round_)


def serves(agent: Agent, number: int) -> bool:
    return [model.release for model in agent.hub.models()] == [f"students/faq/releases/{number}"]


async def test_willing_agents_answer_with_updates_or_noise_and_others_decline(cloud: CloudWorld) -> None:
    settings = {
        "newest": cloud.device("newest", adapters=True),
        "older": cloud.device("older", adapters=True),
        "unwilling": cloud.device("unwilling"),
    }
    names = {key: await enrolled(cloud, device) for key, device in settings.items()}
    cloud.student(allow_adapters=True)
    cloud.publish(1)
    cloud.publish(2)
    for key, number in (("newest", 2), ("older", 1), ("unwilling", 2)):
        cloud.assign(names[key], number)
    async with (
        alive(settings["newest"]) as newest,
        alive(settings["older"]) as older,
        alive(settings["unwilling"]) as unwilling,
    ):
        await until(lambda: serves(newest, 2) and serves(older, 1) and serves(unwilling, 2))
        await until(lambda: all(cloud.assignment(name).serving_number for name in names.values()))
        for agent in (newest, older, unwilling):
            for user in ("ada", "bob"):
                agent.store.record_interaction("faq", "students/faq/releases/2", user, "How do I read?", "So.")
        plan = await asyncio.to_thread(open_adapter_round, cloud, 2)
        await until(lambda: len(cloud.batches()) == 2 and unwilling.store.decisions())
        await until(lambda: not newest.store.pending() and not older.store.pending())
        assert [account.entries for account in newest.store.accounts()] == [1]
        assert newest.store.accounts()[0].rho_spent_nano == plan.mechanism.rho_nano
        assert [each.reason for each in unwilling.store.decisions()] == ["POLICY_TOO_WEAK"]
        assert unwilling.store.accounts() == []
    size = plan.adapter.dimension
    found = {names_of(names)[batch.agent_id]: batch for batch in cloud.batches()}
    assert {key: batch.base_release for key, batch in found.items()} == {"newest": 2, "older": 0}
    for batch in found.values():
        values = pb.FeedbackBatch.FromString(cloud.cloud.blobs.read(batch.payload_sha256)).noisy
        assert len(values) == size + 256
        assert batch.noisy == list(layout_of(plan).null_cells(values))
    result = close(cloud, plan)
    assert (result.adapter.agents, result.adapter.release) == (1, 2)
    assert not result.under_noised_agents
    assert result.noise_std == pytest.approx(float(variance_of(plan.mechanism)) ** 0.5)
    assert cloud.cloud.blobs.size(result.adapter.blob_sha256.hex()) == 4 * size


def names_of(names: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("agents/"): key for key, name in names.items()}


def test_without_the_extra_the_round_is_declined_and_the_extra_is_named(
    world: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "opacus" else object())
    with pytest.raises(EbbflowError) as caught:
        Updates(SlotStore(world.folder / "releases"), None).contributions(None, pytest.fail)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.EXTRA_MISSING
    assert caught.value.metadata["extra"] == "edge-torch"


def test_training_stands_back_behind_everything_else_on_the_device() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    assert in_background(priority) == 19
    assert priority() == before


@pytest.mark.parametrize(
    ("outcome", "learns_answer"),
    [(rpb.OUTCOME_ACCEPTED, True), (rpb.OUTCOME_REJECTED, False), (rpb.OUTCOME_UNSPECIFIED, False)],
)
def test_an_answer_is_learnt_only_if_its_user_took_it(
    world: CloudWorld, outcome: "rpb.Outcome.ValueType", learns_answer: bool
) -> None:
    tokenizer = world.tokenizer
    found = tokens_of(Interaction("1", b"u", outcome), "How do I", " read?", tokenizer, 100)
    question = tokenizer.encode("How do I", bos=True)
    expected = [*question, *tokenizer.encode(" read?"), tokenizer.eos_id] if learns_answer else question
    assert found == expected
    assert tokens_of(Interaction("1", b"u", outcome), "How do I", " read?", tokenizer, 3) == expected[:3]
