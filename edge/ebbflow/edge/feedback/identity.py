"""How long the device has had its identity, and whether its users may report under it."""

import datetime as dt
from dataclasses import dataclass

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.windows import AHEAD, first_report, window_start
from ebbflow.edge.feedback.plans import AdmittedPlan

_BEGINNING = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True)
class Identity:
    """Since when this device has been who it is.

    What its users spent under an earlier identity is unknown to the cloud's mirror of this one, and the device's own
    account may be gone. So a new identity stays silent for a window, and then in every window that may hold a charge of
    the earlier one, unless the operator says that the device is new.
    """

    enrol_time: dt.datetime = _BEGINNING
    """When this identity was given, by the cloud's clock or the device's, whichever was later."""
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
        days = admitted.plan.policy.window_days
        begin = min(window_start(admitted.plan.window), window_start(admitted.device_window))
        old_enough = now >= self.enrol_time + dt.timedelta(days=days)
        if self.new_device or (old_enough and begin >= self.enrol_time + AHEAD):
            return
        first = max(self.first_report(days), self.first_report(admitted.device_window_days))
        message = f"this device has a new identity; it reports from {first.date().isoformat()} on"
        raise EbbflowError(Reason.IDENTITY_WAITS, message, first=first.isoformat())
