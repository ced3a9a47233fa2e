"""What private counts say of a rollout's phases, from real batches, on every database."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from feedback_world import DAY, KEYS, NOW, Device, add_fleet, open_round

from ebbflow.cloud.feedback import acceptance, rounds
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    DeviceState,
    Distillation,
    DistillationState,
    OnHalt,
    Release,
    ReleaseState,
    Rollout,
    RolloutDevice,
    RolloutState,
)
from ebbflow.cloud.rollout import results, store
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.rollout.state import Acceptance
from ebbflow.common.identity import keys as identity
from ebbflow.common.privacy.vector import Contribution

CANARIES, OTHERS = ("canary-1", "canary-2"), ("steady-1", "steady-2", "steady-3")
HOUR = dt.timedelta(hours=1)
LONG_AGO = NOW - 20 * DAY


class Fleet:
    """A student whose release 2 the canaries serve since some time, and the feedback side of every device."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.registry, self.devices = registry, {}
        for agent_id in (*CANARIES, *OTHERS):
            KEYS.setdefault(agent_id, identity.generate_key())
            self.devices[agent_id] = Device(folder / agent_id, agent_id)
        add_fleet(registry)
        with registry.transaction() as session:
            for number in (1, 2):
                session.add(_distillation(number))
                session.flush()
                session.add(_release(number))
            session.add(_rollout())
            for agent_id in self.devices:
                row: dict[str, Any] = {"state": AgentState.ACTIVE, "labels": {"site": "berlin"}, "profile": {}}
                session.add(Agent(id=agent_id, create_time=NOW, new_device=True, **row))
                session.flush()
                session.add(Assignment(agent_id=agent_id, student_id="faq", serving_number=1, desired_number=1))
                phase = 0 if agent_id in CANARIES else 1
                session.add(_device(agent_id, phase))

    def serve(self, agent_id: str, since: dt.datetime, number: int = 2) -> None:
        with self.registry.transaction() as session:
            session.get_one(Assignment, (agent_id, "faq")).serving_number = number
            device = session.get_one(RolloutDevice, ("r1", agent_id))
            device.state, device.answer_time = DeviceState.SUCCEEDED, since

    def submit(self, agent_id: str, good: int, failed: int) -> None:
        votes = [Contribution(0)] * good + [Contribution(1, failed=True)] * failed
        device = self.devices[agent_id]
        device.submit(self.registry, device.answer(self.registry, votes))

    def measure(self, *tolerances: float, phase_index: int = 0) -> list[Acceptance | None]:
        with self.registry.transaction() as session:
            session.get_one(Rollout, "r1").phase_index = phase_index
        with self.registry.reading() as session:
            return acceptance.measure(session, session.get_one(Rollout, "r1"), tolerances)


def _distillation(number: int) -> Distillation:
    return Distillation(
        id=f"d{number}",
        student_id="faq",
        state=DistillationState.SUCCEEDED,
        recipe={},
        mixture={},
        base_release=None,
        round_id=None,
        create_time=NOW,
        update_time=NOW,
    )


def _release(number: int) -> Release:
    rest: dict[str, Any] = {"state": ReleaseState.PUBLISHED, "targets": {}, "create_time": NOW}
    return Release(student_id="faq", number=number, distillation_id=f"d{number}", **rest)


def _rollout() -> Rollout:
    return Rollout(
        id="r1",
        student_id="faq",
        release_number=2,
        state=RolloutState.RUNNING,
        phases=[{}, {}],
        create_time=LONG_AGO,
        update_time=LONG_AGO,
    )


def _device(agent_id: str, phase: int) -> RolloutDevice:
    return RolloutDevice(rollout_id="r1", agent_id=agent_id, phase=phase, state=DeviceState.WAITING, previous_number=1)


@pytest.fixture
def fleet(registry: Registry, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(registry, tmp_path)
    yield made
    for device in made.devices.values():
        device.store.close()


def test_a_worse_release_shows_once_the_round_is_closed(fleet: Fleet) -> None:
    for agent_id in CANARIES:
        fleet.serve(agent_id, since=LONG_AGO)
    round_ = open_round(fleet.registry)
    for agent_id in CANARIES:
        fleet.submit(agent_id, good=300, failed=300)
    for agent_id in OTHERS:
        fleet.submit(agent_id, good=540, failed=60)
    assert fleet.measure(0.1, 0.0) == [None, None], "three kiosks of the cohort are missing"
    with fleet.registry.transaction() as session:
        rounds.close_round(session, round_.id)
    canaries, rest = fleet.measure(0.1, 0.1)
    assert rest is None, "its phase has not begun"
    assert canaries is not None
    assert canaries.rate == pytest.approx(0.5, abs=0.1)
    assert canaries.elsewhere == pytest.approx(0.9, abs=0.05)
    assert canaries.informative
    assert canaries.drop_significant
    assert fleet.measure(0.0, 0.0) == [None, None], "nobody looks"


def test_an_open_round_counts_once_nearly_all_of_its_cohort_has_answered(fleet: Fleet) -> None:
    for agent_id in CANARIES:
        fleet.serve(agent_id, since=LONG_AGO)
    with fleet.registry.transaction() as session:
        for agent_id in ("kiosk-1", "kiosk-2", "kiosk-3"):
            session.get_one(Agent, agent_id).state = AgentState.REVOKED
    open_round(fleet.registry)
    everybody = (*OTHERS, *CANARIES)
    for agent_id in everybody[:-1]:
        fleet.submit(agent_id, good=450, failed=50)
        assert fleet.measure(0.1, 0.0)[0] is None
    fleet.submit(everybody[-1], good=450, failed=50)
    found = fleet.measure(0.1, 0.0)[0]
    assert found is not None
    assert not found.drop_significant


def test_devices_that_have_just_come_are_on_neither_side_and_later_ones_are_still_elsewhere(fleet: Fleet) -> None:
    for agent_id in CANARIES:
        fleet.serve(agent_id, since=LONG_AGO)
    round_ = open_round(fleet.registry)
    for agent_id in CANARIES:
        fleet.submit(agent_id, good=300, failed=300)
    for agent_id in OTHERS:
        fleet.submit(agent_id, good=540, failed=60)
    with fleet.registry.transaction() as session:
        rounds.close_round(session, round_.id)
    before = fleet.measure(0.1, 0.1)[0]
    for agent_id in OTHERS[:2]:
        fleet.serve(agent_id, since=NOW + HOUR)
    assert fleet.measure(0.1, 0.1, phase_index=1) == [before, None], "their batches came before the release did"
    for agent_id in OTHERS[:2]:
        fleet.serve(agent_id, since=NOW - HOUR)
    assert fleet.measure(0.1, 0.1, phase_index=1) == [None, None], "one device alone is left to compare with"
    for agent_id in OTHERS[:2]:
        fleet.serve(agent_id, since=NOW + HOUR)
    for agent_id in CANARIES:
        fleet.serve(agent_id, since=NOW - HOUR)
    assert fleet.measure(0.1, 0.1, phase_index=1) == [None, None], "of seven days, one hour with the release"
    for agent_id in CANARIES:
        fleet.serve(agent_id, since=NOW - 4 * DAY)
    assert fleet.measure(0.1, 0.1, phase_index=1) == [before, None]


def test_rounds_from_before_the_rollout_say_nothing_of_it(fleet: Fleet) -> None:
    round_ = open_round(fleet.registry)
    for agent_id in (*CANARIES, *OTHERS):
        fleet.submit(agent_id, good=400, failed=100)
    with fleet.registry.transaction() as session:
        rounds.close_round(session, round_.id)
        session.get_one(Rollout, "r1").create_time = NOW + 2 * DAY
    for agent_id in CANARIES:
        fleet.serve(agent_id, since=NOW + 2 * DAY)
    assert fleet.measure(0.1, 0.1) == [None, None]


def test_a_device_that_refused_the_release_or_had_it_before_is_told_apart(fleet: Fleet) -> None:
    for agent_id in CANARIES:
        fleet.serve(agent_id, since=LONG_AGO)
    with fleet.registry.transaction() as session:
        refused = session.get_one(RolloutDevice, ("r1", OTHERS[1]))
        refused.state, refused.answer_time = DeviceState.FAILED, LONG_AGO
        session.get_one(Assignment, (OTHERS[2], "faq")).serving_number = 2  # pinned there: no rollout brought it
    round_ = open_round(fleet.registry)
    for agent_id in (*CANARIES, OTHERS[2]):
        fleet.submit(agent_id, good=0, failed=400)
    for agent_id in OTHERS[:2]:
        fleet.submit(agent_id, good=400, failed=0)
    with fleet.registry.transaction() as session:
        rounds.close_round(session, round_.id)
    found = fleet.measure(0.1, 0.0)[0]
    assert found is not None
    assert found.rate < 0.1
    assert found.elsewhere > 0.9
    with fleet.registry.transaction() as session:
        session.get_one(RolloutDevice, ("r1", CANARIES[0])).previous_number = 2
    assert fleet.measure(0.1, 0.0) == [None, None], "one of the two served it before the rollout did anything"


def test_a_rollout_halts_by_what_users_make_of_its_answers(fleet: Fleet) -> None:
    phases = (Phase(count=2, max_acceptance_drop=0.1, soak=60 * DAY), Phase())
    with fleet.registry.transaction() as session:
        session.execute(sa.delete(RolloutDevice))
        session.execute(sa.delete(Rollout))
        session.execute(sa.update(Agent).where(Agent.id.in_(fleet.devices)).values(connected=True))
        spec = RolloutSpec(student_id="faq", number=2, phases=phases, on_halt=OnHalt.ROLL_BACK)
        rollout_id = store.create(session, spec, LONG_AGO).id
    with fleet.registry.reading() as session:
        wanted = sa.select(Assignment.agent_id).where(Assignment.desired_number == 2)
        canaries = set(session.scalars(wanted))
    assert len(canaries) == 2
    for agent_id in canaries:
        with fleet.registry.transaction() as session:
            store.tell(session, agent_id, LONG_AGO)
            session.get_one(Assignment, (agent_id, "faq")).serving_number = 2
            store.answer(session, agent_id, "faq", 2, LONG_AGO, succeeded=True)
    store.tick(fleet.registry, LONG_AGO + HOUR)
    round_ = open_round(fleet.registry)
    for agent_id in fleet.devices:
        bad = agent_id in canaries
        fleet.submit(agent_id, good=300 if bad else 540, failed=300 if bad else 60)
    store.tick(fleet.registry, NOW)
    with fleet.registry.transaction() as session:
        assert session.get_one(Rollout, rollout_id).state is RolloutState.RUNNING
        rounds.close_round(session, round_.id)
    store.tick(fleet.registry, NOW + HOUR)
    with fleet.registry.reading() as session:
        row = session.get_one(Rollout, rollout_id)
        assert row.state is RolloutState.HALTED
        assert "of outcomes were good" in row.reason
        assert session.scalars(wanted).all() == []
        found = results.of(session, row, NOW + HOUR).phases[0].acceptance
    assert found is not None
    assert found.informative
