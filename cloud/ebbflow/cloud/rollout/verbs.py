"""What people do to a rollout. Decisions without IO, like `machine`."""

import datetime as dt
from collections.abc import Collection, Iterable
from dataclasses import replace

from ebbflow.cloud.registry.tables import DeviceState, RolloutState
from ebbflow.cloud.rollout import gates, machine
from ebbflow.cloud.rollout.state import UNFINISHED, Device, Rollout, Step
from ebbflow.common.errors import EbbflowError, Reason


def begin(rollout: Rollout, now: dt.datetime) -> Rollout:
    """Starts the first phase."""
    return replace(rollout, state=RolloutState.RUNNING, phase_begin_time=now)


def approve(rollout: Rollout, creator: str, who: str, now: dt.datetime) -> Rollout:
    """Lets a rollout begin that waits for a second person.

    Raises:
        EbbflowError: STATE_CONFLICT unless it waits for approval; APPROVAL_REQUIRED if `who` is its creator.
    """
    _require(rollout, frozenset({RolloutState.WAITING_FOR_APPROVAL}), "approved")
    if who == creator:
        message = f"{who} created this rollout and cannot approve it"
        raise EbbflowError(Reason.APPROVAL_REQUIRED, message, creator=creator)
    return begin(replace(rollout, approver=who), now)


def pause(rollout: Rollout) -> Rollout:
    """Stops telling further devices.

    Raises:
        EbbflowError: STATE_CONFLICT unless the rollout runs.
    """
    _require(rollout, frozenset({RolloutState.RUNNING}), "paused")
    return replace(rollout, state=RolloutState.PAUSED)


def resume(rollout: Rollout, devices: Iterable[Device], now: dt.datetime) -> Step:
    """Goes on after a pause or a halt.

    After a halt the failed devices try again, and those that went back are brought to the release again. Whoever
    resumes overrules the gates of probe rise and acceptance that would halt the begun phases at once again: they no
    longer look there.

    Raises:
        EbbflowError: STATE_CONFLICT unless the rollout is paused or halted.
    """
    _require(rollout, frozenset({RolloutState.PAUSED, RolloutState.HALTED}), "resumed")
    went_back, known = machine.goes_back(rollout), tuple(devices)
    running = replace(rollout, state=RolloutState.RUNNING, phase_passed_time=None, reason="")
    if rollout.state is RolloutState.HALTED:
        known = tuple(_again(running, device, now, answered=went_back) for device in known)
        running = _overrule(running, known)
    return Step(running, known)


def retry(rollout: Rollout, devices: Iterable[Device], agent_ids: Collection[str], now: dt.datetime) -> Step:
    """Gives failed devices another try, also after the rollout has succeeded.

    Args:
        rollout: where it stands.
        devices: all of its devices.
        agent_ids: which of them; none means all that failed. Those that did not fail stay as they are.
        now: the time.

    Raises:
        EbbflowError: STATE_CONFLICT if it has ended, waits for approval, or is halted (which `resume` ends);
            AGENT_NOT_FOUND if an agent is none of its devices.
    """
    known = tuple(devices)
    _require(rollout, frozenset({RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.SUCCEEDED}), "retried")
    for missing in sorted(set(agent_ids) - {device.agent_id for device in known}):
        message = f"agents/{missing} is no device of this rollout"
        raise EbbflowError(Reason.AGENT_NOT_FOUND, message, agent=f"agents/{missing}")
    chosen = set(agent_ids) or {device.agent_id for device in known}
    retried = (_again(rollout, device, now) if device.agent_id in chosen else device for device in known)
    return Step(replace(rollout, phase_passed_time=_kept(rollout)), tuple(retried))


def abort(rollout: Rollout) -> Rollout:
    """Ends the rollout; `desired` sends its devices back to what they had.

    Raises:
        EbbflowError: STATE_CONFLICT if it has ended already.
    """
    _require(rollout, UNFINISHED, "aborted")
    return replace(rollout, state=RolloutState.ABORTED)


def supersede(rollout: Rollout) -> Rollout:
    """Makes way for a newer rollout: who serves the release keeps it, the others keep what they had.

    Devices that its halt has taken back stay so: its reason is kept, by which `machine.goes_back` knows.
    """
    return replace(rollout, state=RolloutState.SUPERSEDED) if rollout.state in UNFINISHED else rollout


def _require(rollout: Rollout, states: frozenset[RolloutState], verb: str) -> None:
    if rollout.state not in states:
        message = f"a rollout that is {rollout.state.value} cannot be {verb}"
        raise EbbflowError(Reason.STATE_CONFLICT, message, state=rollout.state.value)


def _kept(rollout: Rollout) -> dt.datetime | None:
    """A rollout that succeeded stays so; one that runs soaks anew."""
    return rollout.phase_passed_time if rollout.state is RolloutState.SUCCEEDED else None


def _again(rollout: Rollout, device: Device, now: dt.datetime, *, answered: bool = False) -> Device:
    """Lets a device that failed wait for its turn again, or with `answered` every one that was told.

    Its new turn is drawn from now on: an agent tells by it that this is another try.
    """
    waits = device.state is DeviceState.WAITING
    if waits or device.pinned_number is not None or not (answered or device.state is DeviceState.FAILED):
        return device
    return replace(
        device,
        state=DeviceState.WAITING,
        not_before_time=machine.draw(rollout, device.agent_id, now, now),
        assign_time=None,
        answer_time=None,
        reason="",
        probe_rise=None,
    )


def _overrule(rollout: Rollout, devices: tuple[Device, ...]) -> Rollout:
    """Switches off the gates of the begun phases that would halt them at once again."""
    phases = list(rollout.phases)
    tallies = gates.count(devices, len(phases))
    for index in range(rollout.phase_index + 1):
        if gates.quality_fault(phases[index], tallies[index], gates.acceptance_of(rollout, index)):
            phases[index] = replace(phases[index], max_probe_rise=0.0, max_acceptance_drop=0.0)
    return replace(rollout, phases=tuple(phases))
