"""An agent that ends waits for no work of minutes: nothing is charged, and the round is answered after the restart."""

import asyncio
import datetime as dt
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_students
from adapter_world import adapter_plan, config
from agent_support import alive, assigned, enrolled, until
from agent_world import CloudWorld
from structlog.testing import capture_logs

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback import adapters, cohort, rounds
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.vector import AdapterContribution
from ebbflow.edge.agent import likeness, updates
from ebbflow.edge.agent.background import Halt
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.feedback.adapters import Trainer

HOUR = dt.timedelta(hours=1)
USERS = 5
TOLD = {"round_failed", "round_answered", "round_declined"}
SETTINGS = round_pb2.AdapterSettings(
    users_per_agent=20, rank=1, modules=["o_proj"], steps=2, batch_size=2, sequence_length=16
)


class Gate:
    """Counts what is computed, and holds the first of it until the test says so."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.done = 0

    def through(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*arguments: Any) -> Any:
            found = compute(*arguments)
            self.done += 1
            self.reached.set()
            assert self.opened.wait(60)
            return found

        return computed


@pytest.fixture
def gate() -> Gate:
    return Gate()


def computing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("background")]


def after_computing(gate: Gate, stop: Callable[[], None]) -> Callable[[], None]:
    """While requests still have their grace, and so the student is still there."""

    def stopped() -> None:
        gate.opened.set()
        for thread in computing():
            thread.join(20)
        stop()

    return stopped


async def test_a_round_whose_votes_are_cut_off_is_answered_after_the_restart(
    cloud: CloudWorld, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> Engine:
        engine = load_engine(*arguments, **options)
        monkeypatch.setattr(engine, "embed", gate.through(engine.embed))
        return engine

    monkeypatch.setattr(likeness, "load_engine", load)
    settings = cloud.device()
    name = await assigned(cloud, settings)
    with capture_logs() as logs:
        async with alive(settings) as agent:
            await until(lambda: cloud.assignment(name).serving_number == 1)
            used(agent)
            cloud.open_round(measure=pb.RoundPlan.MEASURE_STUDENT)
            await until(gate.reached.is_set)
            monkeypatch.setattr(agent.hub, "stop", after_computing(gate, agent.hub.stop))
    assert gate.done == 1, "the text that was being looked at, and no other one"
    assert not TOLD & {entry["event"] for entry in logs}
    async with alive(settings) as agent:
        assert agent.store.accounts() == []
        assert [each.reason for each in agent.store.decisions()] == []
        await until(cloud.batches)
        assert [account.entries for account in agent.store.accounts()] == [1]


def open_adapter_round(cloud: CloudWorld, release: int) -> None:
    registry, blobs = cloud.cloud.registry, cloud.cloud.blobs
    with registry.transaction() as session:

        def make(policy: pb.PrivacyPolicy, members: Sequence[cohort.Member]) -> pb.AdapterPlan:
            config = adapters.config_of(session, blobs, "faq", release)
            return adapters.make_adapter_plan(SETTINGS, release, config, policy, len(members))

        student, signer = session.get_one(Student, "faq"), cloud.cloud.plan_signer
        rounds.open_round(session, student, [], signer, now(), HOUR, HOUR, adapter=make)


def used(agent: Agent) -> None:
    for user in range(USERS):
        agent.store.record_interaction("faq", "students/faq/releases/1", f"u{user}", "How do I read?", "So.")


async def test_training_ends_between_two_steps(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_students.write_student(tmp_path / "weights", tiny_students.train_tokenizer(), seed=3, layers=2)
    plan = adapter_plan(config(), steps=256, batch_size=2)
    halt, steps = Halt(), gate.through(lambda: None)
    begun: list[Sequence[Sequence[int]]] = []
    change = Trainer.change

    def watched(trainer: Trainer, sequences: Sequence[Sequence[int]]) -> AdapterContribution:
        begun.append(sequences)
        check = trainer._check
        trainer._check = lambda: (check(), steps())[0]
        return change(trainer, sequences)

    monkeypatch.setattr(Trainer, "change", watched)
    texts = ({"i": [5, 9, 20, 7]} for _ in range(USERS))
    training = asyncio.create_task(asyncio.to_thread(updates._train, tmp_path / "weights", plan, texts, halt))
    await until(gate.reached.is_set)
    halt.call()
    gate.opened.set()
    with pytest.raises(EbbflowError) as caught:
        await training
    assert caught.value.reason is Reason.AGENT_STOPPING
    assert (len(begun), gate.done) == (1, 1)


async def test_a_round_whose_training_is_cut_off_is_answered_after_the_restart(
    cloud: CloudWorld, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "change", gate.through(Trainer.change))
    settings = cloud.device(adapters=True)
    name = await enrolled(cloud, settings)
    cloud.student(allow_adapters=True)
    cloud.publish(1)
    cloud.assign(name, 1)
    with capture_logs() as logs:
        async with alive(settings) as agent:
            await until(lambda: cloud.assignment(name).serving_number == 1)
            used(agent)
            await asyncio.to_thread(open_adapter_round, cloud, 1)
            await until(gate.reached.is_set)
        gate.opened.set()
        await until(lambda: not computing())
    assert gate.done == 1, "the user whose turn it was, and no other one"
    assert not TOLD & {entry["event"] for entry in logs}
    async with alive(settings) as agent:
        assert agent.store.accounts() == []
        await until(cloud.batches)
        assert [account.entries for account in agent.store.accounts()] == [1]
    assert gate.done == 1 + USERS
