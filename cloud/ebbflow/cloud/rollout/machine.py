"""The decisions of a rollout, without IO: facts and the time go in, the next state comes out.

The rules, in the order in which a tick applies them:

1. A device of a begun phase that already serves the release has succeeded. A device that was told and stays silent
   beyond its phase's limit has failed. A device that was never told (it is off) is neither.
2. Failures halt: a begun phase in which, after enough answers, more than the failure share failed; or in which every
   device answered and too few succeeded. A halt stays until somebody acts.
3. Success advances: after enough answers and for the soak time, at least the success share succeeded. The last phase
   also waits for everybody who is under way. A phase whose devices have all gone away takes one from a later phase,
   so that nobody gets a release that no device has tried.
4. What a device should serve follows from all this (`desired`): exactly one release, the new one or the one before.

A tick runs to its fixed point, so a second one at the same time changes nothing.
"""

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ebbflow.cloud.registry.tables import DeviceState, RolloutState
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.common.errors import EbbflowError, Reason

UNFINISHED = frozenset({RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.HALTED})
HANDING_OUT = frozenset({RolloutState.RUNNING, RolloutState.SUCCEEDED})
OVER = frozenset({RolloutState.ABORTED, RolloutState.SUPERSEDED})
ANSWERED = frozenset({DeviceState.SUCCEEDED, DeviceState.FAILED})


@dataclass(frozen=True, kw_only=True)
class Device:
    """What is known of one device."""

    agent_id: str
    phase: int
    previous_number: int | None
    """Release that it goes back to."""
    state: DeviceState = DeviceState.WAITING
    assign_time: dt.datetime | None = None
    """When it was told, or last said that it is fetching."""
    answer_time: dt.datetime | None = None
    reason: str = ""
    serving_number: int | None = None
    """Release that it says it serves."""
    available: bool = True
    """Whether it may take part: not revoked, not quarantined, still selected by the student."""
    connected: bool = True
    """Whether a live line to it exists."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Where a rollout stands."""

    release_number: int
    phases: tuple[Phase, ...]
    state: RolloutState = RolloutState.RUNNING
    phase_index: int = 0
    phase_passed_time: dt.datetime | None = None
    reason: str = ""


@dataclass(frozen=True)
class Step:
    """What came of a decision: the rollout and every device, in the order given."""

    rollout: Rollout
    devices: tuple[Device, ...]


def desired(rollout: Rollout, device: Device) -> int | None:
    """The one release that the device should serve; None means none at all."""
    if rollout.state is RolloutState.ABORTED or device.state is DeviceState.FAILED:
        return device.previous_number
    if device.state is DeviceState.WAITING:
        begun = rollout.state in HANDING_OUT and device.phase <= rollout.phase_index
        return rollout.release_number if begun else device.previous_number
    if rollout.state is RolloutState.SUPERSEDED and device.state is DeviceState.ASSIGNED:
        return device.previous_number
    return rollout.release_number


def tell(rollout: Rollout, device: Device, now: dt.datetime) -> Device:
    """Notes that the device has read its desired state; from now on silence counts."""
    if device.state is not DeviceState.WAITING or desired(rollout, device) != rollout.release_number:
        return device
    return replace(device, state=DeviceState.ASSIGNED, assign_time=now)


def fetching(device: Device, now: dt.datetime) -> Device:
    """Notes a sign of life on the way: the silence limit runs anew."""
    return replace(device, assign_time=now) if device.state is DeviceState.ASSIGNED else device


def answer(device: Device, succeeded: bool, now: dt.datetime, reason: str = "") -> Device:
    """Notes what became of the release; the last word holds."""
    state = DeviceState.SUCCEEDED if succeeded else DeviceState.FAILED
    if device.state is state:
        return device
    return replace(device, state=state, answer_time=now, reason="" if succeeded else reason)


def tick(rollout: Rollout, devices: Iterable[Device], now: dt.datetime) -> Step:
    """Takes every step that is due."""
    known = tuple(devices)
    while True:
        settled = tuple(_settle(rollout, device, now) for device in known)
        moved, settled = _move(rollout, settled, now)
        if moved == rollout and settled == known:
            return Step(rollout, known)
        rollout, known = moved, settled


def pause(rollout: Rollout) -> Rollout:
    """Stops telling further devices.

    Raises:
        EbbflowError: STATE_CONFLICT unless the rollout runs.
    """
    _require(rollout, frozenset({RolloutState.RUNNING}), "paused")
    return replace(rollout, state=RolloutState.PAUSED)


def resume(rollout: Rollout, devices: Iterable[Device]) -> Step:
    """Goes on after a pause or a halt; after a halt the failed devices try again.

    Raises:
        EbbflowError: STATE_CONFLICT unless the rollout is paused or halted.
    """
    _require(rollout, frozenset({RolloutState.PAUSED, RolloutState.HALTED}), "resumed")
    retried = tuple(_retry(device) if rollout.state is RolloutState.HALTED else device for device in devices)
    return Step(replace(rollout, state=RolloutState.RUNNING, phase_passed_time=None, reason=""), retried)


def abort(rollout: Rollout) -> Rollout:
    """Ends the rollout; `desired` sends its devices back to what they had.

    Raises:
        EbbflowError: STATE_CONFLICT if it has ended already.
    """
    _require(rollout, UNFINISHED, "aborted")
    return replace(rollout, state=RolloutState.ABORTED)


def supersede(rollout: Rollout) -> Rollout:
    """Makes way for a newer rollout: who serves the release keeps it, the others keep what they had."""
    return replace(rollout, state=RolloutState.SUPERSEDED) if rollout.state in UNFINISHED else rollout


def _require(rollout: Rollout, states: frozenset[RolloutState], verb: str) -> None:
    if rollout.state not in states:
        message = f"a rollout that is {rollout.state.value} cannot be {verb}"
        raise EbbflowError(Reason.STATE_CONFLICT, message, state=rollout.state.value)


def _retry(device: Device) -> Device:
    if device.state is not DeviceState.FAILED:
        return device
    return replace(device, state=DeviceState.WAITING, assign_time=None, answer_time=None, reason="")


def _settle(rollout: Rollout, device: Device, now: dt.datetime) -> Device:
    """Rule 1 for one device."""
    begun = device.phase <= rollout.phase_index and rollout.state in HANDING_OUT
    pending = device.state is DeviceState.ASSIGNED or (device.state is DeviceState.WAITING and begun)
    if rollout.state in OVER or not pending or not device.available:
        return device
    if device.serving_number == rollout.release_number:
        return answer(device, succeeded=True, now=now)
    limit = rollout.phases[device.phase].silence_limit
    if device.assign_time is not None and now - device.assign_time >= limit:
        return answer(device, succeeded=False, now=now, reason="SILENT")
    return device


def _move(rollout: Rollout, devices: tuple[Device, ...], now: dt.datetime) -> tuple[Rollout, tuple[Device, ...]]:
    """Rules 2 and 3, one step."""
    if rollout.state is not RolloutState.RUNNING:
        return rollout, devices
    tallies = _count(devices, len(rollout.phases))
    if reason := _fault(rollout, tallies):
        return replace(rollout, state=RolloutState.HALTED, phase_passed_time=None, reason=reason), devices
    index, last = rollout.phase_index, rollout.phase_index == len(rollout.phases) - 1
    if not tallies[index].members and not last and (promoted := _promote(devices, index)) != devices:
        return rollout, promoted
    return _progress(rollout, tallies[index], now, last=last), devices


def _progress(rollout: Rollout, tally: "_Tally", now: dt.datetime, *, last: bool) -> Rollout:
    """Rule 3: the same rollout, soaking, in its next phase, or done."""
    phase = rollout.phases[rollout.phase_index]
    if not tally.passes(phase, last=last):
        return replace(rollout, phase_passed_time=None)
    passed_time = rollout.phase_passed_time or now
    if tally.members and now - passed_time < phase.soak:
        return replace(rollout, phase_passed_time=passed_time)
    if last:
        return replace(rollout, state=RolloutState.SUCCEEDED, phase_passed_time=passed_time)
    return replace(rollout, phase_index=rollout.phase_index + 1, phase_passed_time=None)


def _fault(rollout: Rollout, tallies: "Sequence[_Tally]") -> str:
    """Why the rollout must halt, or an empty text."""
    begun = rollout.phase_index + 1
    for index, (phase, tally) in enumerate(zip(rollout.phases[:begun], tallies[:begun], strict=True)):
        if not tally.enough(phase):
            continue
        told = f"phase {index}: {tally.failed} of {tally.answered} devices that answered failed"
        if tally.failed > phase.failure_share * tally.answered:
            return told
        if tally.answered == tally.members and tally.succeeded < phase.success_share * tally.answered:
            return f"{told}; too few succeeded"
    return ""


def _promote(devices: tuple[Device, ...], index: int) -> tuple[Device, ...]:
    """Brings one waiting device of a later phase into a phase that has lost all of its own."""
    later = [d for d in devices if d.phase > index and d.state is DeviceState.WAITING and d.available]
    if not later:
        return devices
    chosen = min(later, key=lambda d: (not d.connected, d.phase, d.agent_id)).agent_id
    return tuple(replace(d, phase=index) if d.agent_id == chosen else d for d in devices)


@dataclass
class _Tally:
    """Counts of one phase."""

    members: int = 0
    succeeded: int = 0
    failed: int = 0
    under_way: int = 0

    @property
    def answered(self) -> int:
        return self.succeeded + self.failed

    def add(self, device: Device) -> None:
        """Counts a device; those that went away without an answer are none."""
        if not device.available and device.state not in ANSWERED:
            return
        self.members += 1
        self.succeeded += device.state is DeviceState.SUCCEEDED
        self.failed += device.state is DeviceState.FAILED
        waiting = device.state is DeviceState.WAITING and device.connected
        self.under_way += waiting or device.state is DeviceState.ASSIGNED

    def enough(self, phase: Phase) -> bool:
        """Whether the shares count yet."""
        return 0 < self.answered >= min(phase.min_answers, self.members)

    def passes(self, phase: Phase, *, last: bool) -> bool:
        """Whether the success share is met."""
        if not self.members:
            return True
        if last and self.under_way:
            return False
        return self.enough(phase) and self.succeeded >= phase.success_share * self.answered


def _count(devices: Iterable[Device], phases: int) -> list[_Tally]:
    tallies = [_Tally() for _ in range(phases)]
    for device in devices:
        tallies[device.phase].add(device)
    return tallies
