"""A new identity stays silent for a window and a day, unless nobody used the device before."""

import datetime as dt
from collections.abc import Callable

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.identity import Identity
from ebbflow.edge.feedback.plans import AdmittedPlan

DAY = dt.timedelta(days=1)
Admit = Callable[..., AdmittedPlan]


@pytest.mark.parametrize("age_days", [0, 30.9])
def test_a_young_identity_waits_and_says_until_when(admitted: Admit, now: dt.datetime, age_days: float) -> None:
    identity = Identity(now - age_days * DAY)
    with pytest.raises(EbbflowError) as caught:
        identity.check(admitted(), now)
    assert caught.value.reason is Reason.IDENTITY_WAITS
    assert caught.value.metadata["first"] == (now + (31 - age_days) * DAY).isoformat()


def test_an_old_identity_and_a_new_device_do_not_wait(admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    Identity(now - 31 * DAY).check(plan, now)
    Identity(now, new_device=True).check(plan, now)
    Identity().check(plan, now)
