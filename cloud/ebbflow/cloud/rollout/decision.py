"""What a rollout does next, and why not yet. Decisions without IO, in the words that people read."""

import datetime as dt
from collections.abc import Iterable, Sequence

from ebbflow.cloud.registry.tables import RolloutState
from ebbflow.cloud.rollout import gates, windows
from ebbflow.cloud.rollout.gates import Tally
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.state import Decision, Device, Rollout

_NOTHING = Decision("", "it has ended")


def next_decision(rollout: Rollout, devices: Iterable[Device], now: dt.datetime) -> Decision:
    """What the rollout does next, by its devices."""
    return decide(rollout, gates.count(devices, len(rollout.phases)), now)


def decide(rollout: Rollout, tallies: Sequence[Tally], now: dt.datetime) -> Decision:
    """The same by the counts of its phases."""
    match rollout.state:
        case RolloutState.WAITING_FOR_APPROVAL:
            return Decision("begin phase 1", "a second person must approve it")
        case RolloutState.PAUSED:
            return Decision(f"go on with phase {rollout.phase_index + 1}", "somebody paused it and must resume it")
        case RolloutState.HALTED:
            return Decision("nothing until somebody resumes or aborts it", rollout.reason)
        case RolloutState.SUCCEEDED:
            return _later_agents(rollout, tallies, now)
        case RolloutState.RUNNING:
            return _running(rollout, tallies, now)
        case _:
            return _NOTHING


def _later_agents(rollout: Rollout, tallies: Sequence[Tally], now: dt.datetime) -> Decision:
    pending = sum(tally.waiting + tally.assigned for tally in tallies)
    action = f"bring release {rollout.release_number} to later agents"
    if pending and not windows.is_open(rollout.windows, now):
        opens = windows.next_open(rollout.windows, now)
        return Decision(action, f"the maintenance window is shut, {_devices(pending)} to come", opens)
    return Decision(action, f"{_devices(pending)} to come" if pending else "none waits for it")


def _running(rollout: Rollout, tallies: Sequence[Tally], now: dt.datetime) -> Decision:
    index = rollout.phase_index
    phase, tally = rollout.phases[index], tallies[index]
    last = index == len(rollout.phases) - 1
    action = "finish" if last else f"advance to phase {index + 2}"
    shut = not windows.is_open(rollout.windows, now)
    if shut and not tally.passes(phase, last=last) and tally.waiting and not tally.assigned:
        opens = windows.next_open(rollout.windows, now)
        told = f"tell {_devices(tally.waiting)} of phase {index + 1}"
        return Decision(told, "the maintenance window is shut", opens)
    if reason := _lacks(phase, tally, last=last):
        return Decision(action, reason)
    ends = soak_end(rollout)
    if ends is not None and ends > now and tally.members:
        return Decision(action, "it soaks", ends)
    return Decision(action, "nothing is in the way", now)


def soak_end(rollout: Rollout) -> dt.datetime | None:
    """When the current phase has soaked; None until its success share is met."""
    if rollout.phase_passed_time is None:
        return None
    return rollout.phase_passed_time + rollout.phases[rollout.phase_index].soak


def _lacks(phase: Phase, tally: Tally, *, last: bool) -> str:
    """What a phase still needs, or an empty text."""
    if not tally.members:
        return ""
    if not tally.enough(phase):
        return f"{tally.answered} of {tally.answers_needed(phase)} answers are in"
    if not tally.met(phase):
        return f"{tally.succeeded} of {tally.answered} that answered succeeded, {phase.success_share:.0%} must"
    return f"{_devices(tally.under_way)} under way" if last and tally.under_way else ""


def _devices(count: int) -> str:
    return f"{count} {'device' if count == 1 else 'devices'}"
