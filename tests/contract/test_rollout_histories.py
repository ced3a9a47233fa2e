"""Random histories of one student's rollouts in the registry, with several of them one after the other.

What `tests/unit/rollout/test_histories.py` claims of one rollout is claimed here of what agents are told in the end.
"""

import contextlib
import datetime as dt
import itertools
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    DeviceState,
    Distillation,
    DistillationState,
    OnHalt,
    Pin,
    Release,
    ReleaseState,
    Rollout,
    RolloutDevice,
    RolloutState,
    Student,
)
from ebbflow.cloud.rollout import facts, machine, pins, store, windows
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.reconcile import RECHECK
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.rollout.state import Step
from ebbflow.cloud.rollout.windows import Window
from ebbflow.common.errors import EbbflowError

NOW = dt.datetime(2026, 11, 1, 20, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
NIGHTLY = (Window(start="22:00", duration=dt.timedelta(hours=4)),)
RELEASES = (1, 2, 3)
STEPS = (0, 1, 60, 7200, 20 * 3600)
PLANS = (
    (Phase(),),
    (Phase(count=1), Phase(failure_share=0.5, success_share=0.5)),
    (Phase(share=0.4, soak=60 * SECOND, min_answers=2), Phase(share=0.5), Phase(failure_share=0.3, success_share=0.7)),
)
runs = itertools.count()
which = st.integers(0, 7)
numbers = st.sampled_from(RELEASES)


class Student3(RuleBasedStateMachine):
    """A student with three releases and five agents of its own, among those of the examples before."""

    registry: Registry

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.student = f"student-{next(runs)}"
        self.agents = [f"{self.student}-{number}" for number in range(5)]
        with self.registry.transaction() as session:
            add_student(session, self.student)
            for agent in self.agents:
                add_agent(session, agent, self.student)

    def attempt(self, act: Callable[[Session], Any]) -> None:
        """What somebody may or may not be allowed to do now; what is refused leaves nothing behind."""
        with contextlib.suppress(EbbflowError), self.registry.transaction() as session:
            act(session)

    def agent(self, choice: int) -> str:
        return self.agents[choice % len(self.agents)]

    def rows(self) -> list[Rollout]:
        with self.registry.reading() as session:
            query = sa.select(Rollout).where(Rollout.student_id == self.student).order_by(Rollout.create_time)
            return list(session.scalars(query))

    # Time, replicas, agents

    @rule(step=st.sampled_from(STEPS))
    def time_passes_and_a_replica_ticks(self, step: int) -> None:
        self.now += step * SECOND
        store.tick(self.registry, self.now)

    @rule(step=st.sampled_from(STEPS))
    def the_clock_is_put_back(self, step: int) -> None:
        self.now -= step * SECOND

    @rule()
    def a_replica_ticks_though_nothing_is_due(self) -> None:
        with self.registry.transaction() as session:
            store.tick_student(session, self.student, self.now)
        before = self.told()
        with self.registry.transaction() as session:
            assert store.tick_student(session, self.student, self.now) == 0
        assert self.told() == before
        self.every_device_is_as_a_tick_over_all_of_them_leaves_it()

    def every_device_is_as_a_tick_over_all_of_them_leaves_it(self) -> None:
        """What the database counted is what the machine says when it reads every device."""
        with self.registry.reading() as session:
            if (row := facts.governing(session, self.student)) is None:
                return
            known = facts.load(session, row)
        step = machine.tick(known.rollout, known.devices, self.now)
        assert step == Step(known.rollout, known.devices)
        for device in known.devices:
            if device.available:
                assert known.desired.get(device.agent_id) == machine.desired(known.rollout, device, self.now)

    @rule(choice=which)
    def an_agent_reads(self, choice: int) -> None:
        agent = self.agent(choice)
        with self.registry.transaction() as session:
            before = self.states(session, agent)
            store.tell(session, agent, self.now)
            after = self.states(session, agent)
            for rollout_id in before:
                if before[rollout_id] is not after[rollout_id]:
                    self.check_told(session, rollout_id, agent)

    def check_told(self, session: Session, rollout_id: str, agent: str) -> None:
        row = session.get_one(Rollout, rollout_id)
        device = session.get_one(RolloutDevice, (rollout_id, agent), populate_existing=True)
        assert row.state in machine.HANDING_OUT
        assert facts.governing(session, self.student) is row
        assert windows.is_open(facts.rollout_of(row).windows, self.now)
        assert device.not_before_time is not None
        assert device.not_before_time <= self.now
        assert session.get(Pin, (agent, self.student)) is None
        assert row.creator != "approval" or row.approver

    def states(self, session: Session, agent: str) -> dict[str, DeviceState]:
        session.flush()
        device = RolloutDevice
        query = sa.select(device.rollout_id, device.state).join(Rollout, Rollout.id == device.rollout_id)
        return {found.rollout_id: found.state for found in session.execute(query.where(device.agent_id == agent))}

    @rule(choice=which, succeeded=st.booleans())
    def an_agent_installs_what_it_reads(self, choice: int, succeeded: bool) -> None:
        agent = self.agent(choice)
        self.an_agent_reads(choice)
        with self.registry.transaction() as session:
            assignment = session.get(Assignment, (agent, self.student))
            if assignment is None or (number := assignment.desired_number) is None:
                return
            if succeeded:
                assignment.serving_number = number
            store.answer(session, agent, self.student, number, self.now, succeeded=succeeded, reason="PROBE_LOSS")

    @rule(choice=which, number=numbers)
    def an_agent_reports_something_old(self, choice: int, number: int) -> None:
        agent = self.agent(choice)
        with self.registry.transaction() as session:
            assignment = session.get(Assignment, (agent, self.student))
            if assignment is not None and assignment.serving_number == number:
                store.answer(session, agent, self.student, number, self.now, succeeded=True)

    @rule(choice=which, connected=st.booleans(), active=st.booleans())
    def an_agent_comes_or_goes(self, choice: int, connected: bool, active: bool) -> None:
        with self.registry.transaction() as session:
            row = session.get_one(Agent, self.agent(choice))
            row.connected = connected
            row.state = AgentState.ACTIVE if active else AgentState.QUARANTINED

    @rule()
    def an_agent_enrols(self) -> None:
        if len(self.agents) < 8:
            self.agents.append(f"{self.student}-{len(self.agents)}")
            with self.registry.transaction() as session:
                add_agent(session, self.agents[-1], self.student)

    # People

    @rule(
        number=numbers,
        plan=st.sampled_from(PLANS),
        approval=st.booleans(),
        windowed=st.booleans(),
        on_halt=st.sampled_from(OnHalt),
    )
    def somebody_starts_a_rollout(
        self, number: int, plan: tuple[Phase, ...], approval: bool, windowed: bool, on_halt: OnHalt
    ) -> None:
        spec = RolloutSpec(
            student_id=self.student,
            number=number,
            phases=plan,
            windows=NIGHTLY if windowed else (),
            spread_s=60.0,
            on_halt=on_halt,
            creator="approval" if approval else "admins/ada",
            approval_required=approval,
        )
        self.attempt(lambda session: store.create(session, spec, self.now))

    @rule(choice=which, verb=st.sampled_from([store.pause, store.resume, store.resume, store.abort]))
    def somebody_acts(self, choice: int, verb: Callable[[Session, str, dt.datetime], Rollout]) -> None:
        if rows := self.rows():
            self.attempt(lambda session: verb(session, rows[-1 - choice % len(rows)].id, self.now))

    @rule(choice=which)
    def somebody_approves(self, choice: int) -> None:
        if rows := self.rows():
            self.attempt(lambda session: store.approve(session, rows[choice % len(rows)].id, "admins/bob", self.now))

    @rule(choice=which)
    def somebody_retries(self, choice: int) -> None:
        if rows := self.rows():
            self.attempt(lambda session: store.retry(session, rows[choice % len(rows)].id, [], self.now))

    @rule(number=st.sampled_from([None, *RELEASES]))
    def somebody_rolls_back(self, number: int | None) -> None:
        self.attempt(lambda session: store.roll_back(session, self.student, number, "admins/ada", self.now))

    @rule(choice=which, number=numbers)
    def somebody_pins(self, choice: int, number: int) -> None:
        with self.registry.transaction() as session:
            held = session.get(Pin, (self.agent(choice), self.student))
            if held is not None or number not in self.allowed(session):
                return
            session.add(
                Pin(
                    agent_id=self.agent(choice),
                    student_id=self.student,
                    release_number=number,
                    reason="",
                    create_time=self.now,
                )
            )
            session.flush()
            store.tick_student(session, self.student, self.now)
            if (row := session.get(Assignment, (self.agent(choice), self.student))) is not None:
                row.desired_number = number

    @rule(choice=which)
    def somebody_unpins(self, choice: int) -> None:
        with self.registry.transaction() as session:
            pins.unpin(session, self.agent(choice), self.student, self.now)

    @rule(number=numbers, rare=st.integers(0, 3))
    def somebody_revokes(self, number: int, rare: int) -> None:
        if rare:
            return
        with self.registry.transaction() as session:
            session.get_one(Release, (self.student, number)).state = ReleaseState.REVOKED
            store.revoke(session, self.student, number, self.now)

    # What always holds

    def allowed(self, session: Session) -> set[int]:
        query = sa.select(Release.number).where(Release.student_id == self.student)
        return set(session.scalars(query.where(Release.state == ReleaseState.PUBLISHED)))

    def told(self) -> dict[str, int | None]:
        with self.registry.reading() as session:
            query = sa.select(Assignment).where(Assignment.student_id == self.student)
            return {row.agent_id: row.desired_number for row in session.scalars(query)}

    @invariant()
    def at_most_one_rollout_is_under_way(self) -> None:
        assert sum(row.state in machine.BEGUN for row in self.rows()) <= 1

    @invariant()
    def nothing_is_told_that_may_not_be_installed(self) -> None:
        with self.registry.reading() as session:
            allowed = {None, *self.allowed(session)}
        assert set(self.told().values()) <= allowed

    @invariant()
    def a_pinned_agent_is_told_nothing_else(self) -> None:
        told = self.told()
        with self.registry.reading() as session:
            for pin in session.scalars(sa.select(Pin).where(Pin.student_id == self.student)):
                assert told.get(pin.agent_id, pin.release_number) == pin.release_number

    def teardown(self) -> None:
        """From now on all is well: what is unfinished ends, and everybody is told what the newest rollout says."""
        with self.registry.transaction() as session:
            session.execute(
                sa.update(Agent).where(Agent.id.in_(self.agents)).values(state=AgentState.ACTIVE, connected=True)
            )
        later = max(self.now, NOW) + dt.timedelta(days=2)
        self.now = later.replace(hour=22, minute=0)  # the window opens
        for _ in range(6):
            self.now += dt.timedelta(minutes=30)
            store.tick(self.registry, self.now)
            self.now += 61 * SECOND
            for number in range(len(self.agents)):
                self.an_agent_installs_what_it_reads(number, True)
            self.now += RECHECK
            store.tick(self.registry, self.now)
        self.check_where_everybody_ends()
        with self.registry.transaction() as session:  # the next example has a student of its own
            session.execute(sa.update(Rollout).where(Rollout.student_id == self.student).values(due_time=None))

    def check_where_everybody_ends(self) -> None:
        with self.registry.reading() as session:
            row = facts.governing(session, self.student)
            if row is None:
                return
            assert row.state is not RolloutState.RUNNING, "a healthy fleet never waits for ever"
            known = facts.load(session, row)
            held = set(session.scalars(sa.select(Pin.agent_id).where(Pin.student_id == self.student)))
        assert {device.agent_id for device in known.devices} >= set(self.agents) - held
        for device in known.devices:
            assert known.desired.get(device.agent_id) == machine.desired(known.rollout, device, self.now)


def add_student(session: Session, student: str) -> None:
    session.add(
        Student(
            id=student,
            teacher="/models/teacher",
            architecture={},
            corpus_sha256="0" * 64,
            topics=["a"],
            privacy_policy={},
            selector=f"student={student}",
            create_time=NOW,
        )
    )
    session.flush()
    for number in RELEASES:
        job = f"{student}-{number}"
        session.add(
            Distillation(
                id=job,
                student_id=student,
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
            Release(
                student_id=student,
                number=number,
                distillation_id=job,
                state=ReleaseState.PUBLISHED,
                targets={},
                create_time=NOW,
            )
        )


def add_agent(session: Session, agent: str, student: str) -> None:
    session.add(
        Agent(
            id=agent,
            state=AgentState.ACTIVE,
            labels={"student": student},
            profile={},
            create_time=NOW,
            connected=True,
        )
    )


def test_no_history_of_a_student_breaks_the_rules(registry: Registry) -> None:
    machine_of = type("Student3OnThisDatabase", (Student3,), {"registry": registry})
    run_state_machine_as_test(
        machine_of,
        settings=settings(
            max_examples=8, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
