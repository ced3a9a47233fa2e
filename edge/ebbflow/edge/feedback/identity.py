"""How long the device has had its identity, and whether its users may report under it."""

import datetime as dt
from dataclasses import dataclass

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.windows import first_report
from ebbflow.edge.feedback.plans import AdmittedPlan

_BEGINNING = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True)
class Identity:
    """Since when this device has been who it is.

    What its users spent under an earlier identity is unknown to the cloud's mirror of this one, and the device's own
    account may be gone. So a new identity stays silent for a window and a day, unless the operator says that the device
    is new.
    """

    enrol_time: dt.datetime = _BEGINNING
    """By the cloud's clock, from the first certificate."""
    new_device: bool = False
    """The operator's word that nobody used the device under another identity."""

    def first_report(self, window_days: int) -> dt.datetime:
        """Returns from when on rounds of such windows are answered."""
        return first_report(self.enrol_time, window_days, new_device=self.new_device)

    def check(self, admitted: AdmittedPlan, now: dt.datetime) -> None:
        """Refuses a plan that comes too early.

        Raises:
            EbbflowError: IDENTITY_WAITS.
        """
        first = self.first_report(admitted.plan.policy.window_days)
        if now < first:
            message = f"this device has a new identity; it reports from {first.date().isoformat()} on"
            raise EbbflowError(Reason.IDENTITY_WAITS, message, first=first.isoformat())
