"""What a rollout and its devices are, for the decisions about them. Plain values: no IO, no clock."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from ebbflow.cloud.registry.tables import DeviceState, OnHalt, RolloutState
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.windows import Window

BEGUN = frozenset({RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.HALTED})
UNFINISHED = BEGUN | {RolloutState.WAITING_FOR_APPROVAL}
HANDING_OUT = frozenset({RolloutState.RUNNING, RolloutState.SUCCEEDED})
LIVING = BEGUN | HANDING_OUT
"""States in which it may say what devices serve."""
OVER = frozenset({RolloutState.ABORTED, RolloutState.SUPERSEDED})
ANSWERED = frozenset({DeviceState.SUCCEEDED, DeviceState.FAILED})


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What private counts say of a phase's devices, from `ebbflow.cloud.feedback.acceptance`."""

    rate: float
    """Share of outcomes that were good on the phase's devices."""
    elsewhere: float
    """The same on the student's other devices in the same round."""
    drop_significant: bool
    """Whether the first is lower by more than the phase allows, with 95 % confidence."""
    informative: bool
    """Whether the counts say enough to be acted on."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What is known of one device."""

    agent_id: str
    phase: int
    previous_number: int | None
    """Release that it goes back to; one that may be installed, or none."""
    state: DeviceState = DeviceState.WAITING
    not_before_time: dt.datetime | None = None
    """When its turn comes; none until its phase has begun and a window was open."""
    assign_time: dt.datetime | None = None
    """When it was told, last said that it is fetching, or said that it goes on."""
    answer_time: dt.datetime | None = None
    reason: str = ""
    probe_rise: float | None = None
    """Its probe loss above the published one, in nats per token; none until it has measured."""
    serving_number: int | None = None
    """Release that it says it serves."""
    pinned_number: int | None = None
    """Release that somebody holds it on: it takes no part."""
    available: bool = True
    """Whether it may take part: not revoked, quarantined or pinned, and still selected by the student."""
    connected: bool = True
    """Whether a live line to it exists."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Where a rollout stands."""

    release_number: int
    phases: tuple[Phase, ...]
    rollout_id: str = ""
    windows: tuple[Window, ...] = ()
    spread: dt.timedelta = dt.timedelta(0)
    on_halt: OnHalt = OnHalt.HOLD
    state: RolloutState = RolloutState.RUNNING
    phase_index: int = 0
    phase_begin_time: dt.datetime | None = None
    phase_passed_time: dt.datetime | None = None
    reason: str = ""
    approver: str = ""
    allowed: bool = True
    """Whether its release may still be installed: not revoked, not below the student's lowest one."""
    acceptance: Sequence[Acceptance | None] = ()
    """By phase, what private counts say; none where nobody looks."""


@dataclass(frozen=True)
class Step:
    """What came of a decision: the rollout and every device, in the order given."""

    rollout: Rollout
    devices: tuple[Device, ...]


@dataclass(frozen=True)
class Decision:
    """What a rollout does next."""

    action: str
    """What, such as "advance to phase 2"; empty if nothing more happens."""
    reason: str
    """Why not yet, such as "2 of 5 answers are in"."""
    earliest_time: dt.datetime | None = None
    """The earliest time at which it can happen by itself; None if time alone does not bring it."""
