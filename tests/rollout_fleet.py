"""A student with releases in the registry, its agents, and what people and agents do."""

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import resources_pb2
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    DeviceState,
    Distillation,
    DistillationState,
    Pin,
    Release,
    ReleaseState,
    Rollout,
    RolloutDevice,
    RolloutState,
    Student,
)
from ebbflow.cloud.rollout import store
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.services import installations
from ebbflow.common.errors import EbbflowError, Reason

NOW = dt.datetime(2026, 11, 1, 12, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
CANARY_THEN_ALL = [Phase(share=0.2), Phase(failure_share=0.3, success_share=0.7, min_answers=2)]


class Fleet:
    """A student with releases, its agents, and a clock."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.now = NOW

    def add_student(self, releases: int = 3, selector: str = "") -> None:
        with self.registry.transaction() as session:
            session.add(
                Student(
                    id="faq",
                    teacher="/models/teacher",
                    architecture={},
                    corpus_sha256="0" * 64,
                    topics=["a"],
                    privacy_policy={},
                    selector=selector,
                    create_time=NOW,
                )
            )
            session.flush()
            for number in range(1, releases + 1):
                self._add_release(session, number, ReleaseState.PUBLISHED)

    def _add_release(self, session: Session, number: int, state: ReleaseState, student_id: str = "faq") -> None:
        job = f"{student_id}-{number}"
        session.add(
            Distillation(
                id=job,
                student_id=student_id,
                state=DistillationState.SUCCEEDED,
                recipe={},
                mixture={},
                base_release=None,
                round_id=None,
                create_time=NOW,
                update_time=NOW,
            )
        )
        session.flush()
        session.add(
            Release(student_id=student_id, number=number, distillation_id=job, state=state, targets={}, create_time=NOW)
        )

    def add_agents(self, *agent_ids: str, **fields: Any) -> None:
        with self.registry.transaction() as session:
            for agent_id in agent_ids:
                row: dict[str, Any] = {
                    "labels": {},
                    "profile": {},
                    "state": AgentState.ACTIVE,
                    "connected": True,
                    **fields,
                }
                session.add(Agent(id=agent_id, create_time=NOW, **row))

    def add_student_named(self, student_id: str) -> None:
        """A student with one release of another one's distillation."""
        with self.registry.transaction() as session:
            session.add(
                Student(
                    id=student_id,
                    teacher="/models/teacher",
                    architecture={},
                    corpus_sha256="0" * 64,
                    topics=["a"],
                    privacy_policy={},
                    selector="",
                    create_time=NOW,
                )
            )
            session.flush()
            self._add_release(session, 1, ReleaseState.PUBLISHED, student_id)

    def set_release(self, number: int, state: ReleaseState) -> None:
        with self.registry.transaction() as session:
            session.get_one(Release, ("faq", number)).state = state

    def raise_min(self, number: int) -> None:
        with self.registry.transaction() as session:
            session.get_one(Student, "faq").min_release = number

    def add_pin(self, agent_id: str, number: int) -> None:
        with self.registry.transaction() as session:
            session.add(
                Pin(agent_id=agent_id, student_id="faq", release_number=number, reason="a demo", create_time=NOW)
            )

    def pins(self) -> dict[str, int]:
        with self.registry.reading() as session:
            return {row.agent_id: row.release_number for row in session.scalars(sa.select(Pin))}

    def publish_losses(self, number: int, losses: list[float]) -> None:
        """What the gate measured, by precision: bf16 and int8."""
        with self.registry.transaction() as session:
            release = session.get_one(Release, ("faq", number))
            release.card = {"probeLoss": losses}
            release.targets = {
                f"student/faq/{number}.{kind}": {"sha256": "0" * 64, "size_bytes": 1000, "kind": kind}
                for kind in ("manifest", "int8", "bf16")
            }

    def measure(self, agent_id: str, number: int, *, loss: float, fetched: int = 0) -> None:
        """An agent that runs int8 reads, installs, measures and reports; twice, since an answer may get lost."""
        self.look(agent_id)
        for _ in range(2):
            with self.registry.transaction() as session:
                row = session.get_one(Assignment, (agent_id, "faq"))
                row.serving_number, row.installation = number, {"precision": "PRECISION_INT8"}
                store.answer(
                    session,
                    agent_id,
                    "faq",
                    number,
                    self.now,
                    succeeded=True,
                    probe_loss=loss,
                    fetched_bytes=fetched,
                    full_bytes=1000,
                )

    def start(self, number: int, plan: list[Phase] | None = None, *, student_id: str = "faq", **fields: Any) -> str:
        self.now += SECOND
        phases = tuple(CANARY_THEN_ALL if plan is None else plan)
        with self.registry.transaction() as session:
            spec = RolloutSpec(student_id=student_id, number=number, phases=phases, creator="admins/ada", **fields)
            return store.create(session, spec, self.now).id

    def tick(self, later: dt.timedelta = dt.timedelta(0)) -> int:
        self.now += later
        return store.tick(self.registry, self.now)

    def verb(self, act: Callable[[Session, str, dt.datetime], Rollout], rollout_id: str) -> None:
        with self.registry.transaction() as session:
            act(session, rollout_id, self.now)

    def desired(self) -> dict[str, int | None]:
        with self.registry.reading() as session:
            return {row.agent_id: row.desired_number for row in session.scalars(sa.select(Assignment))}

    def wanting(self, number: int) -> list[str]:
        return sorted(agent for agent, wanted in self.desired().items() if wanted == number)

    def look(self, agent_id: str) -> None:
        """An agent reads its desired state."""
        with self.registry.transaction() as session:
            if store.untold(session, agent_id, self.now):
                store.tell(session, agent_id, self.now)

    def answer(self, agent_id: str, number: int, succeeded: bool = True) -> None:
        """What an agent does: reads its desired state, then reports."""
        with self.registry.transaction() as session:
            store.tell(session, agent_id, self.now)
        with self.registry.transaction() as session:
            if succeeded:
                row = session.get_one(Assignment, (agent_id, "faq"))
                row.serving_number = number
            store.answer(session, agent_id, "faq", number, self.now, succeeded=succeeded, reason="PROBE_LOSS")

    def report(self, agent_id: str, number: int) -> None:
        """The same, through the report that an agent sends."""
        with self.registry.transaction() as session:
            store.tell(session, agent_id, self.now)
        installation = resources_pb2.Installation(
            student="students/faq",
            release=f"students/faq/releases/{number}",
            state=resources_pb2.INSTALLATION_STATE_SERVING,
        )
        with self.registry.transaction() as session:
            installations.report(session, agent_id, installation, self.now)

    def state(self, rollout_id: str) -> RolloutState:
        with self.registry.reading() as session:
            return session.get_one(Rollout, rollout_id).state

    def device(self, rollout_id: str, agent_id: str) -> RolloutDevice:
        with self.registry.reading() as session:
            return session.get_one(RolloutDevice, (rollout_id, agent_id))

    def finish(self, rollout_id: str, number: int) -> None:
        self.finish_all(rollout_id, number)
        assert self.state(rollout_id) is RolloutState.SUCCEEDED

    def finish_all(self, rollout_id: str, number: int, besides: str = "") -> None:
        for _ in range(3):
            for agent_id in sorted(set(self.wanting(number)) - {besides}):
                if self.device(rollout_id, agent_id).state is not DeviceState.SUCCEEDED:
                    self.answer(agent_id, number)
            self.tick(SECOND)


def full(registry: Registry) -> Fleet:
    """A student with three releases and ten agents."""
    made = Fleet(registry)
    made.add_student()
    made.add_agents(*(f"agent-{number}" for number in range(10)))
    return made


def conflict(act: Callable[[], Any]) -> Reason:
    with pytest.raises(EbbflowError) as caught:
        act()
    return caught.value.reason


def approve(fleet: Fleet, rollout: str, who: str = "admins/bob") -> None:
    with fleet.registry.transaction() as session:
        store.approve(session, rollout, who, fleet.now)


def roll_back(fleet: Fleet, number: int | None = None) -> str:
    fleet.now += SECOND
    with fleet.registry.transaction() as session:
        return store.roll_back(session, "faq", number, "admins/ada", fleet.now).id


def revoke(fleet: Fleet, number: int) -> None:
    fleet.set_release(number, ReleaseState.REVOKED)
    with fleet.registry.transaction() as session:
        store.revoke(session, "faq", number, fleet.now)
