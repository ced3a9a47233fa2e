"""The decisions of a rollout, without IO: facts and the time go in, the next state comes out.

The rules, in the order in which a tick applies them:

0. A rollout whose release may no longer be installed has ended.
1. A device of a begun phase that already serves the release has succeeded. A device that was told and stays silent
   beyond its phase's limit has failed. A device that was never told (it is off) is neither. Each device of a begun
   phase gets a time of its own within the spread, as soon as a maintenance window is open.
2. Failures halt, and so do devices that serve the release worse than allowed (`gates.fault`). A halt stays until
   somebody acts; with `on_halt` ROLL_BACK it takes every device back to what it had.
3. Success advances: after enough answers and for the soak time, at least the success share succeeded. The last phase
   also waits for everybody who is under way. A phase whose devices have all gone away takes one from a later phase,
   so that nobody gets a release that no device has tried.
4. What a device should serve follows from all this (`desired`): exactly one release, the new one or the one before.
   A device that nobody has told yet is offered the new one only while a window is open.

A tick runs to its fixed point, so a second one at the same time changes nothing. What people do is in `verbs`.
"""

import datetime as dt
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ebbflow.cloud.registry.tables import DeviceState, OnHalt, RolloutState
from ebbflow.cloud.rollout import gates, windows
from ebbflow.cloud.rollout.state import (
    ANSWERED,
    BEGUN,
    HANDING_OUT,
    LIVING,
    OVER,
    UNFINISHED,
    Acceptance,
    Decision,
    Device,
    Rollout,
    Step,
)

__all__ = [
    "ANSWERED",
    "BEGUN",
    "HANDING_OUT",
    "LIVING",
    "OVER",
    "UNFINISHED",
    "Acceptance",
    "Decision",
    "Device",
    "Rollout",
    "Step",
    "answer",
    "desired",
    "draw",
    "fetching",
    "next_due",
    "rests",
    "tell",
    "tick",
]

MAX_DEFERRAL = dt.timedelta(days=7)
"""A device may say that it goes on so much later, not more: transfer windows are weekly."""


def desired(rollout: Rollout, device: Device, now: dt.datetime) -> int | None:
    """The one release that the device should serve; None means none at all."""
    if device.pinned_number is not None:
        return device.pinned_number
    if device.state is DeviceState.FAILED or goes_back(rollout):
        return rollout.release_number if _has_no_other(rollout, device) else device.previous_number
    if device.state is DeviceState.WAITING:
        return rollout.release_number if _offered(rollout, device, now) else device.previous_number
    if rollout.state is RolloutState.SUPERSEDED and device.state is DeviceState.ASSIGNED:
        return device.previous_number
    return rollout.release_number


def goes_back(rollout: Rollout) -> bool:
    """Whether every device is to serve what it had before."""
    halted = rollout.state is RolloutState.HALTED or (rollout.state is RolloutState.SUPERSEDED and rollout.reason != "")
    rolled_back = halted and rollout.on_halt is OnHalt.ROLL_BACK
    return rolled_back or rollout.state is RolloutState.ABORTED or not rollout.allowed


def tell(rollout: Rollout, device: Device, now: dt.datetime) -> Device:
    """Notes that the device has read its desired state; it counts as told once its turn has come."""
    if device.state is not DeviceState.WAITING or desired(rollout, device, now) != rollout.release_number:
        return device
    if device.pinned_number is not None or not _offered(rollout, device, now) or not _its_turn(device, now):
        return device
    return replace(device, state=DeviceState.ASSIGNED, assign_time=now)


def fetching(rollout: Rollout, device: Device, now: dt.datetime, resume_time: dt.datetime | None = None) -> Device:
    """Notes a sign of life on the way: the silence limit runs anew, or from when a device that waits goes on.

    A device that was offered the release before its turn, and begins when its turn comes, counts as told by this.
    """
    began = device.state is DeviceState.WAITING and _begun(rollout, device) and _its_turn(device, now)
    if device.pinned_number is not None or not (device.state is DeviceState.ASSIGNED or began):
        return device
    since = max(now, min(resume_time or now, now + MAX_DEFERRAL))
    return replace(device, state=DeviceState.ASSIGNED, assign_time=since)


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


def rests(rollout: Rollout, tallies: Sequence[gates.Tally], now: dt.datetime) -> bool:
    """Whether rules 0, 2 and 3 leave a rollout as it is, by the counts of its phases alone."""
    if not rollout.allowed or rollout.state is not RolloutState.RUNNING:
        return rollout.allowed or rollout.state in OVER
    index, last = rollout.phase_index, rollout.phase_index == len(rollout.phases) - 1
    promotes = not tallies[index].members and any(tally.waiting for tally in tallies[index + 1 :])
    if promotes or gates.fault(rollout, tallies):
        return False
    return _progress(rollout, tallies[index], now, last=last) == rollout


def draw(rollout: Rollout, agent_id: str, begin: dt.datetime, now: dt.datetime) -> dt.datetime | None:
    """When a device's turn comes: a time of its own within the spread from `begin`, the same on every replica.

    It lies inside the window that is open now, or in what is left of it after `begin`; None while no window is open.
    """
    span = windows.span(rollout.windows, now)
    if span is None:
        return None
    begin = max(begin, span.opening)
    digest = hashlib.sha256(f"{rollout.rollout_id}/{agent_id}/turn".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return begin + share * max(dt.timedelta(0), min(rollout.spread, span.close - begin))


def next_due(rollout: Rollout, devices: Iterable[Device], now: dt.datetime) -> dt.datetime | None:
    """The earliest later time at which a tick can change something if nothing else happens; None if there is none."""
    times = [*_deadlines(rollout, devices), windows.next_change(rollout.windows, now)]
    if rollout.state is RolloutState.RUNNING and rollout.phase_passed_time:
        times.append(rollout.phase_passed_time + rollout.phases[rollout.phase_index].soak)
    return min((time for time in times if time is not None and time > now), default=None)


def _deadlines(rollout: Rollout, devices: Iterable[Device]) -> Iterator[dt.datetime]:
    for device in devices:
        if device.state is DeviceState.ASSIGNED and device.available:
            yield _silence_ends(rollout, device)


def _has_no_other(rollout: Rollout, device: Device) -> bool:
    """Whether going back would end serving, although nobody decided so: a halt leaves a device its only release."""
    alone = device.state is DeviceState.SUCCEEDED and device.previous_number is None
    return alone and rollout.state is not RolloutState.ABORTED and rollout.allowed


def _begun(rollout: Rollout, device: Device) -> bool:
    return device.phase <= rollout.phase_index and rollout.state in HANDING_OUT and rollout.allowed


def _offered(rollout: Rollout, device: Device, now: dt.datetime) -> bool:
    """Whether a device that waits may read the new release now."""
    drawn = device.not_before_time is not None
    return drawn and _begun(rollout, device) and windows.is_open(rollout.windows, now)


def _its_turn(device: Device, now: dt.datetime) -> bool:
    return device.not_before_time is not None and device.not_before_time <= now


def _silence_ends(rollout: Rollout, device: Device) -> dt.datetime:
    times = [time for time in (device.assign_time, device.not_before_time) if time is not None]
    return max(times) + rollout.phases[device.phase].silence_limit


def _settle(rollout: Rollout, device: Device, now: dt.datetime) -> Device:
    """Rule 1 for one device."""
    if rollout.state not in LIVING or not device.available:
        return device
    if device.state is DeviceState.ASSIGNED:
        if device.serving_number == rollout.release_number:
            return answer(device, succeeded=True, now=now)
        silent = now >= _silence_ends(rollout, device)
        return answer(device, succeeded=False, now=now, reason="SILENT") if silent else device
    if device.state is not DeviceState.WAITING or not _begun(rollout, device):
        return device
    if device.serving_number == rollout.release_number:
        return answer(device, succeeded=True, now=now)
    return _schedule(rollout, device, now)


def _schedule(rollout: Rollout, device: Device, now: dt.datetime) -> Device:
    """Gives a device its turn; one that missed the window before gets a new one in the next."""
    span = windows.span(rollout.windows, now)
    if span is None or (device.not_before_time is not None and device.not_before_time >= span.opening):
        return device
    return replace(device, not_before_time=draw(rollout, device.agent_id, rollout.phase_begin_time or now, now))


def _move(rollout: Rollout, devices: tuple[Device, ...], now: dt.datetime) -> tuple[Rollout, tuple[Device, ...]]:
    """Rules 0, 2 and 3, one step."""
    if not rollout.allowed and rollout.state in UNFINISHED | HANDING_OUT:
        reason = f"release {rollout.release_number} may no longer be installed"
        return replace(rollout, state=RolloutState.ABORTED, reason=reason), devices
    if rollout.state is not RolloutState.RUNNING:
        return rollout, devices
    tallies = gates.count(devices, len(rollout.phases))
    if reason := gates.fault(rollout, tallies):
        return replace(rollout, state=RolloutState.HALTED, phase_passed_time=None, reason=reason), devices
    index, last = rollout.phase_index, rollout.phase_index == len(rollout.phases) - 1
    if not tallies[index].members and not last and (promoted := _promote(devices, index)) != devices:
        return rollout, promoted
    return _progress(rollout, tallies[index], now, last=last), devices


def _progress(rollout: Rollout, tally: gates.Tally, now: dt.datetime, *, last: bool) -> Rollout:
    """Rule 3: the same rollout, soaking, in its next phase, or done."""
    phase = rollout.phases[rollout.phase_index]
    if not tally.passes(phase, last=last):
        return replace(rollout, phase_passed_time=None)
    passed_time = rollout.phase_passed_time or now
    if tally.members and now - passed_time < phase.soak:
        return replace(rollout, phase_passed_time=passed_time)
    if last:
        return replace(rollout, state=RolloutState.SUCCEEDED, phase_passed_time=passed_time)
    return replace(rollout, phase_index=rollout.phase_index + 1, phase_begin_time=now, phase_passed_time=None)


def _promote(devices: tuple[Device, ...], index: int) -> tuple[Device, ...]:
    """Brings one waiting device of a later phase into a phase that has lost all of its own."""
    later = [d for d in devices if d.phase > index and d.state is DeviceState.WAITING and d.available]
    if not later:
        return devices
    chosen = min(later, key=lambda d: (not d.connected, d.phase, d.agent_id)).agent_id
    return tuple(replace(d, phase=index) if d.agent_id == chosen else d for d in devices)
