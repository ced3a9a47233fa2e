"""Who takes part in rollouts, and which releases may be told, on every database."""

import datetime as dt

import pytest
import sqlalchemy as sa
from rollout_fleet import NOW, Fleet, approve, conflict, full, revoke

from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    DeviceState,
    Pin,
    ReleaseState,
    Rollout,
    RolloutDevice,
    RolloutState,
)
from ebbflow.cloud.rollout import store
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.reconcile import RECHECK
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.common.errors import Reason


@pytest.fixture
def fleet(registry: Registry) -> Fleet:
    return full(registry)


# What may no longer be installed


def test_a_revoked_release_is_left_by_every_device_at_once(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    rollout = fleet.start(2)
    fleet.answer(fleet.wanting(2)[0], 2)
    revoke(fleet, 2)
    assert fleet.state(rollout) is RolloutState.ABORTED
    assert len(fleet.wanting(1)) == 10
    assert conflict(lambda: fleet.start(2)) is Reason.RELEASE_REVOKED
    assert conflict(lambda: fleet.verb(store.resume, rollout)) is Reason.STATE_CONFLICT


def test_a_revoked_release_that_everybody_serves_makes_room_for_what_was_proven_before(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    finished = fleet.start(2)
    fleet.finish(finished, 2)
    fleet.add_agents("late")
    revoke(fleet, 2)
    assert fleet.state(finished) is RolloutState.ABORTED
    fleet.tick(RECHECK)
    assert len(fleet.wanting(1)) == 11


def test_nobody_goes_back_to_a_revoked_release(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    fleet.finish(fleet.start(2), 2)
    rollout = fleet.start(3)
    revoke(fleet, 2)
    assert fleet.state(rollout) is RolloutState.RUNNING
    assert len(fleet.wanting(3)) == 2
    assert len(fleet.wanting(1)) == 8
    fleet.verb(store.abort, rollout)
    assert len(fleet.wanting(1)) == 10


def test_without_any_other_release_a_revoked_one_leaves_nothing(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    revoke(fleet, 1)
    assert set(fleet.desired().values()) == {None}


def test_a_rollout_that_waits_for_approval_ends_with_its_release(fleet: Fleet) -> None:
    waiting = fleet.start(2, approval_required=True)
    revoke(fleet, 2)
    assert fleet.state(waiting) is RolloutState.ABORTED
    another = fleet.start(3, approval_required=True)
    fleet.set_release(3, ReleaseState.REVOKED)
    assert conflict(lambda: approve(fleet, another)) is Reason.RELEASE_REVOKED


def test_the_tick_itself_steers_away_from_what_was_forbidden(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    fleet.finish(fleet.start(2), 2)
    fleet.verb(store.abort, fleet.start(3, [Phase()]))
    fleet.raise_min(2)
    fleet.add_pin("agent-0", 1)
    fleet.add_pin("agent-1", 3)
    fleet.tick(RECHECK)
    assert fleet.pins() == {"agent-0": 2, "agent-1": 3}
    assert fleet.wanting(3) == ["agent-1"]
    assert len(fleet.wanting(2)) == 9


def test_a_pin_that_has_nowhere_to_go_is_lifted(fleet: Fleet) -> None:
    fleet.add_pin("agent-0", 1)
    fleet.start(2, [Phase()])
    revoke(fleet, 1)
    assert fleet.pins() == {}
    fleet.tick(RECHECK)
    assert len(fleet.wanting(2)) == 10


# Who takes part


def test_a_pinned_agent_takes_no_part_until_it_is_let_go(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    fleet.add_pin("agent-0", 1)
    rollout = fleet.start(2, [Phase()])
    fleet.finish_all(rollout, 2)
    assert fleet.state(rollout) is RolloutState.SUCCEEDED
    assert fleet.desired()["agent-0"] == 1
    with fleet.registry.transaction() as session:
        session.delete(session.get_one(Pin, ("agent-0", "faq")))
    fleet.look("agent-0")
    fleet.tick()
    assert fleet.desired()["agent-0"] == 2


def test_an_agent_that_is_pinned_on_the_way_stays_where_it_is_held(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    rollout = fleet.start(2, [Phase()])
    fleet.look("agent-0")
    fleet.add_pin("agent-0", 1)
    fleet.tick(RECHECK)
    assert fleet.desired()["agent-0"] == 1
    fleet.tick(dt.timedelta(days=1))
    assert fleet.device(rollout, "agent-0").state is DeviceState.ASSIGNED


def test_an_agent_away_for_months_gets_the_newest_release_at_once(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    fleet.add_agents("away", connected=False)
    fleet.tick(RECHECK)
    rollout = fleet.start(2)
    fleet.finish_all(rollout, 2, besides="away")
    newest = fleet.start(3)
    fleet.finish_all(newest, 3, besides="away")
    revoke(fleet, 2)
    fleet.tick(dt.timedelta(days=90))
    fleet.look("away")
    assert fleet.desired()["away"] == 3
    assert fleet.device(newest, "away").state is DeviceState.ASSIGNED
    assert fleet.device(rollout, "away").state is DeviceState.WAITING, "what came between is nothing to it"


def test_a_preview_says_what_would_begin_and_changes_nothing(registry: Registry) -> None:
    fleet = Fleet(registry)
    fleet.add_student()
    fleet.add_agents(*(f"canary-{n}" for n in range(4)), labels={"ring": "canary"}, connected=False)
    fleet.add_agents(*(f"main-{n}" for n in range(6)))
    fleet.add_pin("main-0", 1)
    plan = (Phase(selector="ring=canary", count=3), Phase(count=2), Phase())
    spec = RolloutSpec(student_id="faq", number=1, phases=plan)
    with registry.transaction() as session:
        found = store.preview(session, spec, NOW)
        assert session.scalars(sa.select(Rollout)).all() == []
    assert found == store.Preview(plan, (3, 2, 4), (0, 2, 3))
    with registry.transaction() as session:
        assert store.preview(session, RolloutSpec(student_id="faq", number=1), NOW).members == (1, 8)
        row = store.create(session, spec, NOW)
        counts = sa.select(RolloutDevice.phase, sa.func.count()).where(RolloutDevice.rollout_id == row.id)
        assert sorted(tuple(found) for found in session.execute(counts.group_by(RolloutDevice.phase))) == [
            (0, 3),
            (1, 2),
            (2, 4),
        ]
