"""What people do to rollouts in the registry, and when devices are told, on every database."""

import datetime as dt

import pytest
from rollout_fleet import NOW, SECOND, Fleet, approve, conflict, full, roll_back

from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    DeviceState,
    OnHalt,
    ReleaseState,
    RolloutState,
)
from ebbflow.cloud.rollout import store
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.reconcile import RECHECK
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.rollout.windows import Window
from ebbflow.common.errors import Reason


@pytest.fixture
def fleet(registry: Registry) -> Fleet:
    return full(registry)


# Approval


def test_nobody_is_told_before_a_second_person_has_approved(fleet: Fleet) -> None:
    rollout = fleet.start(1, [Phase()], approval_required=True)
    fleet.tick(dt.timedelta(days=1))
    assert fleet.state(rollout) is RolloutState.WAITING_FOR_APPROVAL
    assert fleet.wanting(1) == []
    assert conflict(lambda: approve(fleet, rollout, "admins/ada")) is Reason.APPROVAL_REQUIRED
    assert fleet.wanting(1) == []
    approve(fleet, rollout)
    assert len(fleet.wanting(1)) == 10
    assert conflict(lambda: approve(fleet, rollout)) is Reason.STATE_CONFLICT


def test_an_older_rollout_goes_on_until_the_newer_one_is_approved(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    old = fleet.start(2)
    first, second = fleet.wanting(2)
    waiting = fleet.start(3, [Phase()], approval_required=True)
    fleet.answer(first, 2)
    fleet.answer(second, 2)
    fleet.tick()
    assert fleet.state(old) is RolloutState.RUNNING
    assert len(fleet.wanting(2)) == 10
    fleet.add_agents("late")
    fleet.tick(RECHECK)
    assert fleet.desired()["late"] == 2
    approve(fleet, waiting)
    assert fleet.state(old) is RolloutState.SUPERSEDED
    assert len(fleet.wanting(3)) == 11
    assert fleet.device(waiting, first).previous_number == 2, "what it had when it began, not when it was created"


def test_a_rollout_that_was_never_approved_touches_nothing_when_it_is_aborted(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    waiting = fleet.start(3, [Phase()], approval_required=True)
    fleet.finish(fleet.start(2, [Phase()], approval_required=False), 2)
    assert fleet.state(waiting) is RolloutState.SUPERSEDED, "a newer one has begun"
    another = fleet.start(3, [Phase()], approval_required=True)
    fleet.verb(store.abort, another)
    fleet.tick(RECHECK)
    assert len(fleet.wanting(2)) == 10


def test_a_rollout_that_is_approved_after_a_newer_one_succeeded_is_the_one_that_counts(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    with fleet.registry.transaction() as session:
        spec = RolloutSpec(student_id="faq", number=3, phases=(Phase(),), approval_required=True)
        waiting = store.create(session, spec, fleet.now + 3600 * SECOND).id  # by a replica whose clock is ahead
    fleet.finish(fleet.start(2, [Phase()]), 2)
    assert fleet.state(waiting) is RolloutState.WAITING_FOR_APPROVAL
    approve(fleet, waiting)
    fleet.finish(waiting, 3)
    fleet.add_agents("late")
    fleet.tick(RECHECK)
    assert fleet.desired()["late"] == 3


# Windows and spread

NIGHT = (Window(start="22:00", duration=dt.timedelta(hours=4)),)


def test_devices_are_told_only_inside_the_window(fleet: Fleet) -> None:
    rollout = fleet.start(1, [Phase(silence_limit=dt.timedelta(days=1))], windows=NIGHT)
    assert fleet.wanting(1) == []
    fleet.now = NOW.replace(hour=22)
    assert fleet.tick() == 10
    fleet.look("agent-3")
    fleet.now = NOW.replace(day=2, hour=2)
    fleet.tick()
    assert fleet.wanting(1) == ["agent-3"]
    fleet.answer("agent-3", 1)
    assert fleet.device(rollout, "agent-3").state is DeviceState.SUCCEEDED
    fleet.look("agent-4")
    assert fleet.device(rollout, "agent-4").state is DeviceState.WAITING


def test_devices_are_told_one_by_one_within_the_spread(fleet: Fleet) -> None:
    rollout = fleet.start(1, [Phase()], spread_s=3600.0)
    begin = fleet.now
    turns = {agent: fleet.device(rollout, agent).not_before_time for agent in fleet.wanting(1)}
    assert len(turns) == len(set(turns.values())) == 10
    assert all(turn and begin <= turn <= begin + dt.timedelta(hours=1) for turn in turns.values())
    fleet.tick(dt.timedelta(minutes=30))
    for agent in turns:
        fleet.look(agent)
    told = {agent for agent in turns if fleet.device(rollout, agent).state is DeviceState.ASSIGNED}
    assert told == {agent for agent, turn in turns.items() if turn and turn <= fleet.now}


def test_a_device_that_waits_for_its_transfer_window_is_not_silent(fleet: Fleet) -> None:
    rollout = fleet.start(1, [Phase()])
    fleet.look("agent-0")
    resume = fleet.now + dt.timedelta(hours=8)
    with fleet.registry.transaction() as session:
        store.fetching(session, "agent-0", "faq", 1, fleet.now, resume_time=resume)
    fleet.tick(dt.timedelta(hours=8, minutes=59))
    assert fleet.device(rollout, "agent-0").state is DeviceState.ASSIGNED
    fleet.tick(dt.timedelta(minutes=1))
    assert fleet.device(rollout, "agent-0").reason == "SILENT"


# Going back, trying again


def test_a_roll_back_brings_everybody_to_what_they_had_at_once(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    fleet.finish(fleet.start(2), 2)
    made = roll_back(fleet)
    assert len(fleet.wanting(1)) == 10
    fleet.answer("agent-0", 1, succeeded=False)
    fleet.tick()
    assert fleet.desired()["agent-0"] == 1, "it must not go back to what it is to leave"
    fleet.add_agents("late")
    fleet.tick(RECHECK)
    assert fleet.desired()["late"] == 1
    assert fleet.state(made) is RolloutState.HALTED
    fleet.start(3)
    fleet.add_agents("later")
    fleet.tick(RECHECK)
    assert fleet.desired()["later"] == 1, "nor is anybody else given it"


def test_a_roll_back_ends_what_is_unfinished(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    waiting = fleet.start(3, [Phase()], approval_required=True)
    running = fleet.start(2)
    fleet.verb(store.pause, running)
    another = fleet.start(3, [Phase()], approval_required=True)
    made = roll_back(fleet)
    assert [fleet.state(each) for each in (waiting, running, another)] == [
        RolloutState.SUPERSEDED,
        RolloutState.ABORTED,
        RolloutState.ABORTED,
    ]
    assert fleet.state(made) is RolloutState.SUCCEEDED, "nobody had installed the other one yet"
    assert len(fleet.wanting(1)) == 10


def test_a_roll_back_takes_any_release_that_is_allowed_and_no_other(fleet: Fleet) -> None:
    fleet.finish(fleet.start(3, [Phase()]), 3)
    assert conflict(lambda: roll_back(fleet)) is Reason.STATE_CONFLICT
    roll_back(fleet, 2)
    assert len(fleet.wanting(2)) == 10
    fleet.raise_min(2)
    assert conflict(lambda: roll_back(fleet, 1)) is Reason.RELEASE_TOO_OLD
    fleet.set_release(3, ReleaseState.REVOKED)
    assert conflict(lambda: roll_back(fleet, 3)) is Reason.RELEASE_REVOKED
    assert conflict(lambda: roll_back(fleet, 8)) is Reason.RELEASE_NOT_FOUND


def test_a_halt_takes_devices_back_when_the_rollout_says_so(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    rollout = fleet.start(2, on_halt=OnHalt.ROLL_BACK)
    first, second = fleet.wanting(2)
    fleet.answer(first, 2)
    fleet.answer(second, 2, succeeded=False)
    fleet.tick()
    assert fleet.state(rollout) is RolloutState.HALTED
    assert len(fleet.wanting(1)) == 10
    fleet.answer(first, 1)
    assert fleet.device(rollout, first).state is DeviceState.SUCCEEDED
    fleet.verb(store.resume, rollout)
    assert fleet.wanting(2) == sorted([first, second])
    assert fleet.device(rollout, first).state is DeviceState.WAITING


def test_failed_devices_try_again_after_the_rollout_has_succeeded(fleet: Fleet) -> None:
    fleet.finish(fleet.start(1), 1)
    rollout = fleet.start(2, [Phase(success_share=0.5, failure_share=0.5)])
    for number in range(10):
        fleet.answer(f"agent-{number}", 2, succeeded=number > 1)
    fleet.tick()
    assert (fleet.state(rollout), fleet.wanting(1)) == (RolloutState.SUCCEEDED, ["agent-0", "agent-1"])
    with fleet.registry.transaction() as session:
        store.retry(session, rollout, ["agent-1"], fleet.now)
    assert fleet.wanting(1) == ["agent-0"]
    fleet.answer("agent-1", 2)
    assert fleet.device(rollout, "agent-1").state is DeviceState.SUCCEEDED
    fleet.start(3)

    def again() -> None:
        with fleet.registry.transaction() as session:
            store.retry(session, rollout, [], fleet.now)

    assert conflict(again) is Reason.STATE_CONFLICT
