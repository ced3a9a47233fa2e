"""The phases of a rollout: what they ask for, their defaults, and who belongs to which."""

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ebbflow.common.errors import EbbflowError, Reason

MAX_PHASES = 16
DEFAULT_SILENCE_LIMIT = dt.timedelta(hours=1)
CANARY_SHARE = 0.1
CANARY_SOAK = dt.timedelta(seconds=5)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one phase asks for. Shares are of those that answered, not of all: a device that is off blocks nothing."""

    share: float = 1.0
    """Share of the agents that it brings in; ignored in the last phase."""
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


def check(phases: Sequence[Phase]) -> None:
    """Refuses phases that can never work.

    Raises:
        EbbflowError: INVALID_REQUEST naming the phase and the field.
    """
    if not 1 <= len(phases) <= MAX_PHASES:
        message = f"a rollout has 1 to {MAX_PHASES} phases, not {len(phases)}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="phases")
    for index, phase in enumerate(phases):
        last = index == len(phases) - 1
        faults = {
            "share": not (last or 0 < phase.share <= 1),
            "success_share": not 0 < phase.success_share <= 1,
            "failure_share": not 0 <= phase.failure_share < 1,
            "min_answers": phase.min_answers < 1,
            "soak": phase.soak < dt.timedelta(0),
            "silence_limit": phase.silence_limit <= dt.timedelta(0),
        }
        for field, wrong in faults.items():
            if wrong:
                path = f"phases[{index}].{field}"
                raise EbbflowError(Reason.INVALID_REQUEST, f"{path} is out of range", field=path)


def size(share: float, agents: int) -> int:
    """How many of `agents` a phase with this share brings in: rounded up, at least one."""
    return min(agents, max(1, math.ceil(share * agents - 1e-9)))


def defaults(agents: int) -> tuple[Phase, ...]:
    """A canary of a tenth of the agents, then all of them.

    Any failure among the canaries halts. To see a fault that strikes one device in ten with 95 % probability takes 29
    canaries (1 - 0.9**29), so fleets under 290 agents should think about a larger share.
    """
    canaries = size(CANARY_SHARE, agents)
    return (
        Phase(share=CANARY_SHARE, min_answers=max(1, math.ceil(canaries / 2)), soak=CANARY_SOAK),
        Phase(success_share=0.9, failure_share=0.1, min_answers=max(1, math.ceil((agents - canaries) / 10))),
    )


def freeze(agents: Sequence[str], phases: Sequence[Phase]) -> dict[str, int]:
    """Gives every agent its phase, in the order of `agents`; the last phase takes the rest."""
    members: dict[str, int] = {}
    begin = 0
    for index, phase in enumerate(phases[:-1]):
        end = min(len(agents), begin + size(phase.share, len(agents)))
        members |= dict.fromkeys(agents[begin:end], index)
        begin = end
    return members | dict.fromkeys(agents[begin:], len(phases) - 1)
