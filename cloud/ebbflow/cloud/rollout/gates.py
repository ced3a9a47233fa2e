"""The gates of a rollout: what its devices' answers allow and forbid. Decisions without IO."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ebbflow.cloud.registry.tables import DeviceState
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.state import ANSWERED, Acceptance, Device, Rollout


@dataclass
class Tally:
    """Counts of one phase. Devices that went away without an answer are none of its members."""

    members: int = 0
    waiting: int = 0
    """Members that have not been told, connected or not."""
    under_way: int = 0
    """Members that were told, or wait to be and are connected."""
    assigned: int = 0
    succeeded: int = 0
    failed: int = 0
    measured: int = 0
    """Devices that have measured the probe."""
    rise_sum: float = 0.0
    """Their probe losses above the published one, in nats per token."""

    @property
    def answered(self) -> int:
        """Devices that say what became of the release."""
        return self.succeeded + self.failed

    @property
    def mean_rise(self) -> float:
        """Mean rise of the probe loss, in nats per token; 0 if nobody has measured."""
        return self.rise_sum / self.measured if self.measured else 0.0

    def add(self, state: DeviceState, *, available: bool, connected: bool, times: int = 1) -> None:
        """Counts devices that are alike."""
        if not available and state not in ANSWERED:
            return
        waiting = state is DeviceState.WAITING
        self.members += times
        self.waiting += times * waiting
        self.assigned += times * (state is DeviceState.ASSIGNED)
        self.succeeded += times * (state is DeviceState.SUCCEEDED)
        self.failed += times * (state is DeviceState.FAILED)
        self.under_way += times * ((waiting and connected) or state is DeviceState.ASSIGNED)

    def measure(self, rise_sum: float, times: int = 1) -> None:
        """Counts devices that have measured the probe."""
        self.measured += times
        self.rise_sum += rise_sum

    def answers_needed(self, phase: Phase) -> int:
        """Answers before the shares count: never more than there are members."""
        return max(1, min(phase.min_answers, self.members))

    def enough(self, phase: Phase) -> bool:
        """Whether the shares count yet."""
        return self.answered >= self.answers_needed(phase)

    def met(self, phase: Phase) -> bool:
        """Whether enough answered and the success share of them succeeded."""
        return self.enough(phase) and self.succeeded >= phase.success_share * self.answered

    def passes(self, phase: Phase, *, last: bool) -> bool:
        """Whether the phase is done; the last one also waits for everybody who is under way."""
        return not self.members or (self.met(phase) and not (last and self.under_way))


def count(devices: Iterable[Device], phases: int) -> list[Tally]:
    """Counts devices by phase."""
    tallies = [Tally() for _ in range(phases)]
    for device in devices:
        tally = tallies[device.phase]
        tally.add(device.state, available=device.available, connected=device.connected)
        if device.probe_rise is not None:
            tally.measure(device.probe_rise)
    return tallies


def fault(rollout: Rollout, tallies: Sequence[Tally]) -> str:
    """Why the rollout must halt, or an empty text. Phases are counted from 1, as people see them."""
    for index, (phase, tally) in enumerate(_begun(rollout, tallies)):
        found = _failures(phase, tally) or quality_fault(phase, tally, acceptance_of(rollout, index))
        if found:
            return f"phase {index + 1}: {found}"
    return ""


def quality_fault(phase: Phase, tally: Tally, acceptance: Acceptance | None) -> str:
    """Why devices that serve the release serve it worse than they should, or an empty text."""
    risen = phase.max_probe_rise > 0 and tally.enough(phase) and tally.mean_rise > phase.max_probe_rise
    if risen:
        return (
            f"the probe loss rose by {tally.mean_rise:.4g} nats per token on average over {tally.measured} devices,"
            f" {phase.max_probe_rise:g} is allowed"
        )
    dropped = phase.max_acceptance_drop > 0 and acceptance and acceptance.informative and acceptance.drop_significant
    if acceptance and dropped:
        return (
            f"{acceptance.rate:.0%} of outcomes were good, {acceptance.elsewhere:.0%} elsewhere;"
            f" a drop of {phase.max_acceptance_drop:.0%} is allowed"
        )
    return ""


def acceptance_of(rollout: Rollout, index: int) -> Acceptance | None:
    """What private counts say of a phase."""
    return rollout.acceptance[index] if index < len(rollout.acceptance) else None


def _begun(rollout: Rollout, tallies: Sequence[Tally]) -> list[tuple[Phase, Tally]]:
    begun = rollout.phase_index + 1
    return list(zip(rollout.phases[:begun], tallies[:begun], strict=True))


def _failures(phase: Phase, tally: Tally) -> str:
    if not tally.enough(phase):
        return ""
    told = f"{tally.failed} of {tally.answered} devices that answered failed"
    if tally.failed > phase.failure_share * tally.answered:
        return told
    if tally.answered == tally.members and tally.succeeded < phase.success_share * tally.answered:
        return f"{told}; too few succeeded"
    return ""
