"""The phases of a rollout: what they ask for, their defaults, and who belongs to which."""

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ebbflow.cloud.rollout import selector
from ebbflow.common.errors import EbbflowError, Reason

MAX_PHASES = 16
DEFAULT_SILENCE_LIMIT = dt.timedelta(hours=1)
CANARY_SHARE = 0.1
CANARY_SOAK = dt.timedelta(seconds=5)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one phase asks for. Shares are of those that answered, not of all: a device that is off blocks nothing."""

    share: float = 0.0
    """Share of the agents, or of those that `selector` matches, that it brings in; ignored in the last phase."""
    count: int = 0
    """Number of agents that it brings in, instead of a share; ignored in the last phase."""
    selector: str = ""
    """It brings in only agents with these labels: all of them, unless `share` or `count` say how many."""
    success_share: float = 1.0
    """Share that must succeed for the rollout to advance."""
    failure_share: float = 0.0
    """The rollout halts when more than this share fails."""
    min_answers: int = 1
    """Answers needed before either share counts; never more than the devices that can answer."""
    soak: dt.timedelta = dt.timedelta(0)
    """Time to wait between success and the next phase."""
    silence_limit: dt.timedelta = DEFAULT_SILENCE_LIMIT
    """A device that was told and says nothing for so long has failed."""
    max_probe_rise: float = 0.0
    """The rollout halts when the mean probe loss rises by more than this, in nats per token; 0 does not look."""
    max_acceptance_drop: float = 0.0
    """The rollout halts when private counts say that the share of good outcomes fell by more; 0 does not look."""


@dataclass(frozen=True)
class Member:
    """An agent that may take part."""

    agent_id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    connected: bool = True


def check(phases: Sequence[Phase]) -> None:
    """Refuses phases that can never work.

    Raises:
        EbbflowError: INVALID_REQUEST naming the phase and the field.
    """
    if not 1 <= len(phases) <= MAX_PHASES:
        message = f"a rollout has 1 to {MAX_PHASES} phases, not {len(phases)}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="phases")
    for index, phase in enumerate(phases):
        for name, wrong in {**_gate_faults(phase), **_size_faults(phase, last=index == len(phases) - 1)}.items():
            if wrong:
                path = f"phases[{index}].{name}"
                raise EbbflowError(Reason.INVALID_REQUEST, f"{path} is out of range", field=path)
        selector.parse(phase.selector)


def _size_faults(phase: Phase, *, last: bool) -> dict[str, bool]:
    if last:
        return {}
    sized = phase.share > 0 or phase.count > 0 or bool(phase.selector)
    return {
        "share": not (0 <= phase.share <= 1 and sized),
        "count": phase.count < 0 or (phase.count > 0 and phase.share > 0),
    }


def _gate_faults(phase: Phase) -> dict[str, bool]:
    return {
        "success_share": not 0 < phase.success_share <= 1,
        "failure_share": not 0 <= phase.failure_share < 1,
        "min_answers": phase.min_answers < 1,
        "soak": phase.soak < dt.timedelta(0),
        "silence_limit": phase.silence_limit <= dt.timedelta(0),
        "max_probe_rise": not 0 <= phase.max_probe_rise < math.inf,
        "max_acceptance_drop": not 0 <= phase.max_acceptance_drop < 1,
    }


def size(share: float, agents: int) -> int:
    """How many of `agents` a phase with this share brings in: rounded up, at least one."""
    return min(agents, max(1, math.ceil(share * agents - 1e-9)))


def defaults(agents: int) -> tuple[Phase, ...]:
    """A canary of a tenth of the agents, then all of them.

    Any failure among the canaries halts. `advice.agents_needed` says how many canaries see a fault: one that strikes
    one device in ten takes 29 of them, one in twenty 59, one in a hundred 299 (with 95 % probability). Fleets under 290
    agents should therefore think about a larger share.
    """
    canaries = size(CANARY_SHARE, agents)
    return (
        Phase(share=CANARY_SHARE, min_answers=max(1, math.ceil(canaries / 2)), soak=CANARY_SOAK),
        everybody(agents - canaries),
    )


def everybody(agents: int) -> Phase:
    """A last phase for so many agents, in which one in ten may fail."""
    return Phase(share=1.0, success_share=0.9, failure_share=0.1, min_answers=max(1, math.ceil(agents / 10)))


def freeze(members: Sequence[Member], phases: Sequence[Phase]) -> dict[str, int]:
    """Gives every agent its phase: each phase takes its own out of those that are left, in the order of `members`.

    A share is one of all agents that the phase's selector matches, not of those that are left. The last phase takes the
    rest.

    Raises:
        EbbflowError: INVALID_REQUEST if no agent is left that a phase's selector matches, although there are agents.
    """
    placed: dict[str, int] = {}
    for index, phase in enumerate(phases[:-1]):
        wanted = selector.parse(phase.selector)
        matching = [member.agent_id for member in members if selector.matches(wanted, member.labels)]
        left = [agent_id for agent_id in matching if agent_id not in placed]
        if phase.selector and members and not left:
            path = f"phases[{index}].selector"
            message = f"{path}: no agent is left that matches {phase.selector!r}"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field=path)
        placed |= dict.fromkeys(left[: _wanted(phase, len(matching))], index)
    last = len(phases) - 1
    return placed | {member.agent_id: last for member in members if member.agent_id not in placed}


def _wanted(phase: Phase, matching: int) -> int:
    if phase.count:
        return phase.count
    return size(phase.share, matching) if phase.share > 0 else matching
