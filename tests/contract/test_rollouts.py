"""Rollouts in the registry, on every database."""

import datetime as dt
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from rollout_fleet import SECOND, Fleet, full

from ebbflow.cloud.registry.changes import revisions
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    AgentState,
    DeviceState,
    ReleaseState,
    RolloutState,
)
from ebbflow.cloud.rollout import store
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.reconcile import RECHECK
from ebbflow.cloud.services import desired
from ebbflow.common.errors import EbbflowError, Reason


@pytest.fixture
def fleet(registry: Registry) -> Fleet:
    return full(registry)


def test_a_release_reaches_the_canaries_first_and_then_everybody(fleet: Fleet) -> None:
    rollout = fleet.start(1)
    canaries = fleet.wanting(1)
    assert len(canaries) == 2
    fleet.answer(canaries[0], 1)
    assert fleet.tick() == 8
    assert len(fleet.wanting(1)) == 10
    fleet.finish(rollout, 1)


def test_a_tick_with_nothing_new_changes_nothing(fleet: Fleet) -> None:
    fleet.start(1)
    with fleet.registry.reading() as session:
        before = revisions(session)
    assert fleet.tick(SECOND) == 0
    with fleet.registry.reading() as session:
        assert revisions(session) == before


def test_a_failed_canary_halts_and_an_abort_sends_everybody_back(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    rollout = fleet.start(2)
    first, second = fleet.wanting(2)
    fleet.answer(first, 2)
    fleet.answer(second, 2, succeeded=False)
    fleet.tick()
    assert fleet.state(rollout) is RolloutState.HALTED
    assert fleet.desired()[second] == 1
    assert fleet.tick(3600 * SECOND) == 0
    fleet.verb(store.abort, rollout)
    assert len(fleet.wanting(1)) == 10


def test_without_a_release_before_it_an_abort_leaves_nothing_to_serve(fleet: Fleet) -> None:
    fleet.verb(store.abort, fleet.start(1))
    assert set(fleet.desired().values()) <= {None}


def test_a_halt_that_is_resumed_tries_again(fleet: Fleet) -> None:
    rollout = fleet.start(1)
    canary = fleet.wanting(1)[0]
    fleet.answer(canary, 1, succeeded=False)
    fleet.tick()
    assert fleet.wanting(1) == []
    fleet.verb(store.resume, rollout)
    assert canary in fleet.wanting(1)


def test_a_newer_rollout_takes_over_and_goes_back_to_what_was_proven(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    old = fleet.start(2)
    proven, asked = fleet.wanting(2)
    fleet.answer(proven, 2)
    new = fleet.start(3, [Phase()])
    assert fleet.state(old) is RolloutState.SUPERSEDED
    assert len(fleet.wanting(3)) == 10
    assert fleet.device(new, proven).previous_number == 2
    assert fleet.device(new, asked).previous_number == 1
    fleet.verb(store.abort, new)
    assert (fleet.desired()[proven], fleet.desired()[asked]) == (2, 1)


def test_a_late_agent_gets_the_last_finished_release(fleet: Fleet) -> None:
    rollout = fleet.start(1)
    fleet.finish(rollout, 1)
    fleet.add_agents("late")
    fleet.look("late")
    assert fleet.tick() == 1
    assert fleet.desired()["late"] == 1
    fleet.answer("late", 1)
    assert fleet.device(rollout, "late").state is DeviceState.SUCCEEDED


def test_a_late_agent_waits_for_the_last_phase_with_the_release_before(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    rollout = fleet.start(2)
    fleet.add_agents("late")
    fleet.tick(RECHECK)
    assert fleet.desired()["late"] == 1
    assert fleet.device(rollout, "late").phase == 1
    fleet.verb(store.abort, rollout)
    fleet.tick()
    assert fleet.desired()["late"] == 1
    assert len(fleet.wanting(1)) == 11


def test_agents_that_the_student_does_not_select_are_left_out(registry: Registry) -> None:
    fleet = Fleet(registry)
    fleet.add_student(selector="site=berlin")
    fleet.add_agents("in", labels={"site": "berlin"})
    fleet.add_agents("out", labels={"site": "rome"})
    fleet.add_agents("shut", labels={"site": "berlin"}, state=AgentState.QUARANTINED)
    fleet.start(1)
    fleet.tick()
    assert fleet.desired() == {"in": 1}


def test_canaries_are_drawn_among_the_connected(registry: Registry) -> None:
    fleet = Fleet(registry)
    fleet.add_student()
    fleet.add_agents(*(f"off-{number}" for number in range(9)), connected=False)
    fleet.add_agents("on")
    fleet.start(1, [])
    assert fleet.wanting(1) == ["on"]


def test_an_answer_about_another_release_counts_for_nothing(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    rollout = fleet.start(2)
    canary = fleet.wanting(2)[0]
    fleet.answer(canary, 1)
    assert fleet.device(rollout, canary).state is DeviceState.ASSIGNED


def test_a_device_that_was_not_asked_cannot_answer(fleet: Fleet) -> None:
    rollout = fleet.start(1)
    other = next(f"agent-{n}" for n in range(10) if f"agent-{n}" not in fleet.wanting(1))
    with fleet.registry.transaction() as session:
        store.answer(session, other, "faq", 1, fleet.now, succeeded=True)
    assert fleet.device(rollout, other).state is DeviceState.WAITING


def test_silence_after_being_told_is_failure(fleet: Fleet) -> None:
    rollout = fleet.start(1)
    canary = fleet.wanting(1)[0]
    with fleet.registry.transaction() as session:
        store.tell(session, canary, fleet.now)
    fleet.tick(dt.timedelta(minutes=59))
    assert fleet.state(rollout) is RolloutState.RUNNING
    fleet.tick(dt.timedelta(minutes=1))
    assert fleet.state(rollout) is RolloutState.HALTED
    assert fleet.device(rollout, canary).reason == "SILENT"


def test_only_a_published_release_can_be_rolled_out(fleet: Fleet) -> None:
    with fleet.registry.transaction() as session:
        fleet._add_release(session, 9, ReleaseState.PROPOSED)
    for number, reason in ((9, Reason.RELEASE_NOT_PUBLISHED), (10, Reason.RELEASE_NOT_FOUND)):
        with pytest.raises(EbbflowError) as caught:
            fleet.start(number)
        assert caught.value.reason is reason


def test_replicas_that_tick_and_report_at_once_agree(fleet: Fleet) -> None:
    rollout = fleet.start(1, [Phase()])
    agents = fleet.wanting(1)
    with ThreadPoolExecutor(8) as pool:
        work: list[Future[Any]] = [pool.submit(store.tick, fleet.registry, fleet.now) for _ in range(8)]
        work += [pool.submit(fleet.report, agent, 1) for agent in agents]
        for future in work:
            future.result()
    fleet.tick()
    assert fleet.state(rollout) is RolloutState.SUCCEEDED
    assert len(fleet.wanting(1)) == 10


def test_two_rollouts_that_start_at_once_leave_one_active(fleet: Fleet) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = [future.result() for future in [pool.submit(fleet.start, number) for number in (1, 2)]]
    states = sorted(fleet.state(rollout) for rollout in made)
    assert states == [RolloutState.RUNNING, RolloutState.SUPERSEDED]
    assert len(set(fleet.desired().values()) - {None}) == 1


def kept(registry: Registry, agent_id: str) -> list[tuple[str, str]]:
    with registry.reading() as session:
        return [(release.student, release.release) for release in desired.state(session, agent_id)]


def test_an_agent_that_refused_all_it_was_given_is_told_to_keep_what_it_serves(fleet: Fleet) -> None:
    fleet.add_agents("refuser")
    fleet.start(1, [Phase()])
    fleet.tick()
    fleet.answer("refuser", 1, succeeded=False)
    fleet.tick()
    assert fleet.desired()["refuser"] is None
    assert kept(fleet.registry, "refuser") == [("students/faq", "")]


def test_a_late_report_of_the_release_before_does_not_take_the_new_one_back(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    fleet.add_agents("slow")
    fleet.tick(RECHECK)
    fleet.look("slow")
    fleet.start(2, [Phase()])
    assert fleet.desired()["slow"] == 2
    fleet.report("slow", 1)
    assert fleet.desired()["slow"] == 2
