"""What people do to a rollout."""

import datetime as dt
from dataclasses import replace

import pytest
from device_fleet import CANARY_THEN_ALL, NEW, NOW, OLD, SECOND, Fleet

from ebbflow.cloud.registry.tables import DeviceState, OnHalt, RolloutState
from ebbflow.cloud.rollout import verbs
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.common.errors import EbbflowError, Reason


def halted_with(on_halt: OnHalt, previous: int | None = OLD) -> Fleet:
    """Two canaries have the release, a third one fails."""
    fleet = Fleet((Phase(share=0.3, min_answers=3), Phase()), agents=10, previous=previous, on_halt=on_halt)
    for agent in ("agent-000", "agent-001"):
        fleet.answer(agent)
        fleet.devices[agent] = replace(fleet.devices[agent], serving_number=NEW)
    fleet.answer("agent-002", succeeded=False)
    fleet.tick()
    assert fleet.rollout.state is RolloutState.HALTED
    return fleet


def test_a_halt_holds_what_is_proven_or_takes_everybody_back() -> None:
    assert halted_with(OnHalt.HOLD).wanting(NEW) == ["agent-000", "agent-001"]
    assert halted_with(OnHalt.ROLL_BACK).wanting(NEW) == []


def test_a_halt_alone_takes_no_device_its_only_release() -> None:
    assert halted_with(OnHalt.ROLL_BACK, previous=None).wanting(NEW) == ["agent-000", "agent-001"]


def test_resuming_brings_those_that_went_back_to_the_release_again() -> None:
    fleet = halted_with(OnHalt.ROLL_BACK)
    fleet.devices["agent-000"] = replace(fleet.devices["agent-000"], serving_number=OLD)
    fleet.keep(verbs.resume(fleet.rollout, fleet.devices.values(), fleet.now))
    fleet.tick()
    assert fleet.wanting(NEW) == ["agent-000", "agent-001", "agent-002"]
    assert fleet.devices["agent-000"].state is DeviceState.WAITING, "it has to be told again"
    assert fleet.devices["agent-001"].state is DeviceState.SUCCEEDED, "it has not gone back yet"


def test_a_newer_rollout_does_not_bring_back_what_a_halt_has_taken_back() -> None:
    fleet = halted_with(OnHalt.ROLL_BACK)
    fleet.rollout = verbs.supersede(fleet.rollout)
    assert fleet.wanting(NEW) == []


def test_a_device_that_failed_is_given_another_try_also_after_the_rollout_has_succeeded() -> None:
    fleet = Fleet((Phase(success_share=0.5, failure_share=0.5),), agents=3)
    for number in range(3):
        fleet.answer(f"agent-{number:03d}", succeeded=number > 0)
    fleet.tick()
    assert fleet.rollout.state is RolloutState.SUCCEEDED
    before = fleet.devices["agent-000"].not_before_time
    fleet.now += 60 * SECOND
    fleet.keep(verbs.retry(fleet.rollout, fleet.devices.values(), {"agent-000", "agent-001"}, fleet.now))
    fleet.tick()
    assert fleet.rollout.state is RolloutState.SUCCEEDED
    assert len(fleet.wanting(NEW)) == 3
    assert fleet.devices["agent-001"].state is DeviceState.SUCCEEDED
    assert fleet.devices["agent-000"].not_before_time != before, "by which the agent knows that it may try again"


def test_only_what_can_be_retried_is() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=10)
    with pytest.raises(EbbflowError) as caught:
        verbs.retry(fleet.rollout, fleet.devices.values(), {"nobody"}, NOW)
    assert caught.value.reason is Reason.AGENT_NOT_FOUND
    fleet.answer(fleet.wanting(NEW)[0], succeeded=False)
    fleet.tick()
    with pytest.raises(EbbflowError) as caught:
        verbs.retry(fleet.rollout, fleet.devices.values(), (), NOW)
    assert caught.value.reason is Reason.STATE_CONFLICT


def test_only_another_person_can_approve() -> None:
    fleet = Fleet((Phase(),), agents=2, state=RolloutState.WAITING_FOR_APPROVAL)
    fleet.tick(dt.timedelta(days=1))
    assert fleet.wanting(NEW) == []
    with pytest.raises(EbbflowError) as caught:
        verbs.approve(fleet.rollout, "admins/ada", "admins/ada", fleet.now)
    assert caught.value.reason is Reason.APPROVAL_REQUIRED
    fleet.rollout = verbs.approve(fleet.rollout, "admins/ada", "admins/bob", fleet.now)
    fleet.tick()
    assert len(fleet.wanting(NEW)) == 2
    with pytest.raises(EbbflowError) as caught:
        verbs.approve(fleet.rollout, "admins/ada", "admins/eve", fleet.now)
    assert caught.value.reason is Reason.STATE_CONFLICT
