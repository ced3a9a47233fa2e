"""What somebody asks for when they start a rollout."""

import datetime as dt
import math
from dataclasses import dataclass

from ebbflow.cloud.registry.tables import OnHalt
from ebbflow.cloud.rollout import phases as phase_rules
from ebbflow.cloud.rollout import windows as window_rules
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.windows import Window
from ebbflow.common.errors import EbbflowError, Reason

MAX_SPREAD = dt.timedelta(days=7)


@dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    """One rollout, with the student's policy filled in where the request said nothing."""

    student_id: str
    number: int
    """Number of the release."""
    phases: tuple[Phase, ...] = ()
    """None take the built-in ones: `phases.defaults`."""
    windows: tuple[Window, ...] = ()
    """Devices are told only inside these; none means always."""
    spread_s: float = 0.0
    """Each device of a begun phase starts at a time of its own within so many seconds."""
    on_halt: OnHalt = OnHalt.HOLD
    creator: str = ""
    """Resource name, such as "admins/ada"."""
    approval_required: bool = False
    """Whether a second person must approve it before its first device is told."""


def check(spec: RolloutSpec) -> None:
    """Refuses what can never work.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field.
    """
    if spec.phases:
        phase_rules.check(spec.phases)
    window_rules.check(spec.windows)
    if not (math.isfinite(spec.spread_s) and 0 <= spec.spread_s <= MAX_SPREAD.total_seconds()):
        message = f"spread must be 0 to {MAX_SPREAD.days} days"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="spread")
