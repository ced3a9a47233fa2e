"""What came of rollouts, and the tick that moves them, on every database."""

import datetime as dt
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from rollout_fleet import SECOND, Fleet, full

from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    AgentState,
    DeviceState,
    Rollout,
    RolloutState,
)
from ebbflow.cloud.rollout import facts, gates, results, store
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.reconcile import RECHECK
from ebbflow.cloud.rollout.state import Decision


@pytest.fixture
def fleet(registry: Registry) -> Fleet:
    return full(registry)


# What came of it


def test_results_are_counted_by_the_database_as_the_machine_counts_them(fleet: Fleet) -> None:
    fleet.publish_losses(2, [2.0, 2.1])
    fleet.finish(fleet.start(1), 1)
    plan = [Phase(count=4, min_answers=4, failure_share=0.9, success_share=0.1), Phase()]
    rollout = fleet.start(2, plan)
    canaries = fleet.wanting(2)
    fleet.measure(canaries[0], 2, loss=2.3, fetched=100)
    fleet.measure(canaries[1], 2, loss=2.2, fetched=150)
    fleet.answer(canaries[2], 2, succeeded=False)
    fleet.add_agents("gone", state=AgentState.REVOKED)
    with fleet.registry.reading() as session:
        row = session.get_one(Rollout, rollout)
        found = results.of(session, row, fleet.now)
        known = facts.load(session, row)
        tallies = [group.tally for group in results.count(session, row)]
    assert tallies == gates.count(known.devices, 2)
    assert found.phases[0].counts == {
        DeviceState.WAITING: 1,
        DeviceState.ASSIGNED: 0,
        DeviceState.SUCCEEDED: 2,
        DeviceState.FAILED: 1,
    }
    assert found.phases[0].probe_rise == pytest.approx(0.15)  # int8 was published with 2.1
    assert found.failures == (results.Failure("PROBE_LOSS", 1, (canaries[2],)),)
    assert (found.fetched_bytes, found.full_bytes) == (250, 2000)
    assert found.next_decision == Decision("advance to phase 2", "3 of 4 answers are in")


def test_a_rise_of_the_probe_loss_halts(fleet: Fleet) -> None:
    fleet.publish_losses(1, [2.0, 2.1])
    rollout = fleet.start(1, [Phase(count=2, min_answers=2, max_probe_rise=0.1), Phase()])
    for canary in fleet.wanting(1):
        fleet.measure(canary, 1, loss=2.3)
    fleet.tick()
    assert fleet.state(rollout) is RolloutState.HALTED
    with fleet.registry.reading() as session:
        assert session.get_one(Rollout, rollout).reason.startswith("phase 1: the probe loss rose by 0.2 nats")


def test_failures_name_ten_agents_for_each_reason(registry: Registry) -> None:
    fleet = Fleet(registry)
    fleet.add_student()
    agents = [f"agent-{n:02d}" for n in range(14)]
    fleet.add_agents(*agents)
    rollout = fleet.start(1, [Phase(failure_share=0.99, success_share=0.01, min_answers=99)])
    for agent in agents[:12]:
        fleet.answer(agent, 1, succeeded=False)
    with registry.transaction() as session:
        store.tell(session, agents[12], fleet.now)
    with registry.transaction() as session:
        store.answer(session, agents[12], "faq", 1, fleet.now, succeeded=False, reason="DISK_FULL")
    with registry.reading() as session:
        found = results.of(session, session.get_one(Rollout, rollout), fleet.now).failures
    assert [(each.reason, each.count) for each in found] == [("PROBE_LOSS", 12), ("DISK_FULL", 1)]
    assert found[0].agents == tuple(agents[:10])


# The tick


def statements(registry: Registry, act: Callable[[], object]) -> list[str]:
    seen: list[str] = []

    def note(_c: object, _k: object, statement: str, *_: object) -> None:
        seen.append(statement)

    sa.event.listen(registry.engine, "before_cursor_execute", note)
    try:
        act()
    finally:
        sa.event.remove(registry.engine, "before_cursor_execute", note)
    return [statement for statement in seen if not statement.startswith(("BEGIN", "PRAGMA"))]


@pytest.mark.parametrize("finished", [False, True])
def test_a_tick_with_nothing_due_is_one_query(fleet: Fleet, finished: bool) -> None:
    rollout = fleet.start(1)
    if finished:
        fleet.finish(rollout, 1)
    fleet.tick(RECHECK)
    seen = statements(fleet.registry, lambda: fleet.tick(SECOND))
    assert len(seen) == 1, seen
    assert "rollout_devices" not in seen[0]


def test_a_clock_that_is_put_back_stops_no_rollout(fleet: Fleet) -> None:
    rollout = fleet.start(1)
    fleet.tick(dt.timedelta(days=1))
    fleet.now -= dt.timedelta(days=1)
    fleet.add_agents("late")
    fleet.tick()
    assert fleet.device(rollout, "late").phase == 1


def test_what_is_wrong_with_one_student_keeps_no_other_waiting(fleet: Fleet) -> None:
    rollout = fleet.start(1)
    with fleet.registry.transaction() as session:
        broken = session.get_one(Rollout, rollout)
        broken.phases = [{"share": "none"}]
    fleet.add_student_named("other")
    healthy = fleet.start(1, [Phase()], student_id="other")
    fleet.now += RECHECK
    with pytest.raises(Exception, match="share"):
        fleet.tick()
    with fleet.registry.reading() as session:
        due = session.get_one(Rollout, healthy).due_time
    assert due is not None
    assert due > fleet.now


def test_a_replica_that_dies_before_it_commits_has_done_nothing(fleet: Fleet) -> None:
    rollout = fleet.start(1)
    fleet.answer(fleet.wanting(1)[0], 1)

    def dies() -> None:
        with fleet.registry.transaction() as session:
            store.tick_student(session, "faq", fleet.now)
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        dies()
    assert len(fleet.wanting(1)) == 2
    assert fleet.tick() == 8
    assert fleet.state(rollout) is RolloutState.RUNNING
