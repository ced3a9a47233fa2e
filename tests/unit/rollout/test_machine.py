"""The rollout's decisions by example; `test_histories` tries them by the thousand."""

import datetime as dt
from dataclasses import replace

import pytest
from device_fleet import CANARY_THEN_ALL, NEW, NOW, OLD, SECOND, Fleet

from ebbflow.cloud.registry.tables import DeviceState, RolloutState
from ebbflow.cloud.rollout import machine, phases, verbs
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.state import Device
from ebbflow.common.errors import EbbflowError, Reason


def test_only_the_canaries_are_told_at_first() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=30)
    assert len(fleet.wanting(NEW)) == 3
    assert len(fleet.wanting(OLD)) == 27


def test_success_waits_for_its_soak_time_and_then_brings_everybody() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=30)
    for agent in fleet.wanting(NEW):
        fleet.answer(agent)
    fleet.tick(9 * SECOND)
    assert len(fleet.wanting(NEW)) == 3
    fleet.tick(10 * SECOND)
    assert len(fleet.wanting(NEW)) == 30


def test_success_that_does_not_last_soaks_anew() -> None:
    fleet = Fleet((Phase(share=0.1, success_share=0.5, failure_share=0.9, soak=10 * SECOND), Phase()), agents=20)
    first, second = fleet.wanting(NEW)
    fleet.answer(first)
    fleet.tick(9 * SECOND)
    fleet.answer(second, succeeded=False)
    fleet.answer(first, succeeded=False)
    fleet.answer(second)
    fleet.tick(SECOND)
    assert fleet.rollout.phase_passed_time == NOW + 9 * SECOND
    fleet.answer(second, succeeded=False)
    fleet.tick()
    assert fleet.rollout.state is RolloutState.HALTED


def test_one_failed_canary_halts_and_leaves_the_rest_alone() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=30)
    told = fleet.wanting(NEW)
    fleet.answer(told[0], succeeded=False)
    fleet.tick()
    assert fleet.rollout.state is RolloutState.HALTED
    assert fleet.rollout.reason == "phase 1: 1 of 1 devices that answered failed"
    assert fleet.wanting(NEW) == []
    fleet.answer(told[0])
    fleet.tick(3600 * SECOND)
    assert fleet.rollout.state is RolloutState.HALTED


def test_a_device_that_was_told_and_stays_silent_has_failed() -> None:
    fleet = Fleet((Phase(share=0.1, silence_limit=60 * SECOND), Phase()), agents=10)
    (canary,) = fleet.wanting(NEW)
    fleet.tell(canary)
    fleet.tick(59 * SECOND)
    assert fleet.devices[canary].state is DeviceState.ASSIGNED
    fleet.devices[canary] = machine.fetching(fleet.rollout, fleet.devices[canary], fleet.now)
    fleet.tick(59 * SECOND)
    assert fleet.devices[canary].state is DeviceState.ASSIGNED
    fleet.tick(SECOND)
    assert fleet.devices[canary].reason == "SILENT"
    assert fleet.rollout.state is RolloutState.HALTED


def test_a_device_that_is_off_neither_fails_nor_blocks_the_others() -> None:
    fleet = Fleet((Phase(share=0.2, min_answers=1), Phase()), agents=10)
    off, on = fleet.wanting(NEW)
    fleet.answer(on)
    fleet.tick(dt.timedelta(days=30))
    assert fleet.devices[off].state is DeviceState.WAITING
    assert len(fleet.wanting(NEW)) == 10


def test_enough_answers_are_needed_but_never_more_than_devices() -> None:
    fleet = Fleet((Phase(share=0.3, min_answers=100), Phase()), agents=10)
    *most, last = fleet.wanting(NEW)
    for agent in most:
        fleet.answer(agent)
    fleet.tick()
    assert fleet.rollout.phase_index == 0
    fleet.answer(last)
    fleet.tick()
    assert fleet.rollout.phase_index == 1


def test_the_last_phase_waits_for_all_that_are_under_way() -> None:
    fleet = Fleet((Phase(success_share=0.5, failure_share=0.5),), agents=3)
    fleet.answer("agent-000")
    fleet.tell("agent-001")
    fleet.devices["agent-002"] = replace(fleet.devices["agent-002"], connected=False)
    fleet.tick()
    states = [fleet.rollout.state]
    fleet.answer("agent-001")
    fleet.tick()
    assert [*states, fleet.rollout.state] == [RolloutState.RUNNING, RolloutState.SUCCEEDED]
    assert fleet.wanting(NEW) == ["agent-000", "agent-001", "agent-002"]


def test_a_phase_whose_devices_are_gone_takes_another_one() -> None:
    fleet = Fleet((Phase(share=0.1), Phase()), agents=10)
    (canary,) = fleet.wanting(NEW)
    fleet.devices[canary] = replace(fleet.devices[canary], available=False)
    fleet.tick()
    assert fleet.rollout.phase_index == 0
    assert len(set(fleet.wanting(NEW)) - {canary}) == 1


def test_who_serves_the_release_already_has_succeeded() -> None:
    fleet = Fleet((Phase(share=0.5), Phase()), agents=2)
    fleet.devices = {agent: replace(device, serving_number=NEW) for agent, device in fleet.devices.items()}
    fleet.tick()
    assert fleet.rollout.state is RolloutState.SUCCEEDED


def test_an_empty_fleet_succeeds_and_serves_whoever_comes_later() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=0)
    assert fleet.rollout.state is RolloutState.SUCCEEDED
    fleet.devices["late"] = Device(agent_id="late", phase=1, previous_number=None)
    fleet.tick()
    assert fleet.wanting(NEW) == ["late"]


def test_resuming_a_halt_lets_the_failed_try_again() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=10)
    (canary,) = fleet.wanting(NEW)
    fleet.answer(canary, succeeded=False)
    fleet.tick()
    fleet.keep(verbs.resume(fleet.rollout, fleet.devices.values(), fleet.now))
    fleet.tick()
    assert fleet.rollout.state is RolloutState.RUNNING
    assert fleet.wanting(NEW) == [canary]


def test_a_pause_takes_the_release_back_from_who_was_not_told() -> None:
    fleet = Fleet((Phase(share=0.2), Phase()), agents=10)
    told, untold = fleet.wanting(NEW)
    fleet.tell(told)
    fleet.rollout = verbs.pause(fleet.rollout)
    assert fleet.wanting(NEW) == [told]
    fleet.keep(verbs.resume(fleet.rollout, fleet.devices.values(), fleet.now))
    assert fleet.wanting(NEW) == sorted([told, untold])


def test_abort_sends_everybody_back_and_is_final() -> None:
    fleet = Fleet((Phase(share=0.2), Phase()), agents=10)
    for agent in fleet.wanting(NEW):
        fleet.answer(agent)
    fleet.tick()
    fleet.rollout = verbs.abort(fleet.rollout)
    fleet.tick()
    assert len(fleet.wanting(OLD)) == 10
    for verb in (verbs.pause, verbs.abort, lambda rollout: verbs.resume(rollout, (), NOW)):
        with pytest.raises(EbbflowError) as caught:
            verb(fleet.rollout)
        assert caught.value.reason is Reason.STATE_CONFLICT


def test_a_superseded_rollout_keeps_what_is_proven() -> None:
    fleet = Fleet((Phase(share=0.2), Phase()), agents=10)
    proven, asked = fleet.wanting(NEW)
    fleet.answer(proven)
    fleet.tell(asked)
    fleet.rollout = verbs.supersede(fleet.rollout)
    assert fleet.wanting(NEW) == [proven]


@pytest.mark.parametrize(("share", "agents", "wanted"), [(0.1, 30, 3), (0.1, 1, 1), (0.1, 11, 2), (1.0, 7, 7)])
def test_a_phase_is_rounded_up_to_at_least_one(share: float, agents: int, wanted: int) -> None:
    assert phases.size(share, agents) == wanted


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        ((), "phases"),
        ((Phase(share=0.0), Phase()), "phases[0].share"),
        ((Phase(share=1.5), Phase()), "phases[0].share"),
        ((Phase(share=0.1, count=3), Phase()), "phases[0].count"),
        ((Phase(count=-1), Phase()), "phases[0].share"),
        ((Phase(selector="ring"), Phase()), "selector"),
        ((Phase(max_probe_rise=-0.1),), "phases[0].max_probe_rise"),
        ((Phase(max_acceptance_drop=1.0),), "phases[0].max_acceptance_drop"),
        ((Phase(min_answers=0),), "phases[0].min_answers"),
        ((Phase(success_share=1.5),), "phases[0].success_share"),
        ((Phase(failure_share=1.0),), "phases[0].failure_share"),
        ((Phase(soak=-SECOND),), "phases[0].soak"),
        ((Phase(silence_limit=0 * SECOND),), "phases[0].silence_limit"),
    ],
)
def test_phases_that_cannot_work_are_refused_by_name(plan: tuple[Phase, ...], field: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        phases.check(plan)
    assert caught.value.metadata["field"] == field


def test_a_pinned_device_stays_where_it_is_held() -> None:
    fleet = Fleet((Phase(),), agents=2)
    held = replace(fleet.devices["agent-000"], pinned_number=7, available=False)
    fleet.devices["agent-000"] = held
    fleet.tell("agent-000")
    fleet.answer("agent-001")
    fleet.tick()
    assert fleet.devices["agent-000"] == held
    assert fleet.desired() == {"agent-000": 7, "agent-001": NEW}
    assert fleet.rollout.state is RolloutState.SUCCEEDED


@pytest.mark.parametrize("state", [RolloutState.RUNNING, RolloutState.SUCCEEDED, RolloutState.HALTED])
def test_a_rollout_ends_when_its_release_may_no_longer_be_installed(state: RolloutState) -> None:
    fleet = Fleet((Phase(),), agents=2)
    fleet.answer("agent-000")
    fleet.rollout = replace(fleet.rollout, state=state, allowed=False)
    assert fleet.wanting(NEW) == []
    fleet.tick()
    assert fleet.rollout.state is RolloutState.ABORTED
    assert fleet.rollout.reason == "release 2 may no longer be installed"


def test_the_next_tick_is_due_when_time_alone_changes_something() -> None:
    fleet = Fleet((Phase(share=0.5, soak=30 * SECOND, silence_limit=60 * SECOND), Phase()), agents=2)
    assert machine.next_due(fleet.rollout, fleet.devices.values(), fleet.now) is None
    (canary,) = fleet.wanting(NEW)
    fleet.tell(canary)
    assert machine.next_due(fleet.rollout, fleet.devices.values(), fleet.now) == NOW + 60 * SECOND
    fleet.answer(canary)
    fleet.tick()
    assert machine.next_due(fleet.rollout, fleet.devices.values(), fleet.now) == NOW + 30 * SECOND
