"""A new identity stays silent until its windows hold nothing of another's, unless nobody used the device before."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
from feedback_world import SIGNER, signed_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.windows import window_end, window_name, window_start
from ebbflow.edge.feedback.identity import Identity
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore

DAY, TICK = dt.timedelta(days=1), dt.timedelta(microseconds=1)
Admit = Callable[..., AdmittedPlan]


@pytest.mark.parametrize("age_days", [29.9, 6, 0])
def test_a_young_identity_waits_and_says_until_when(admitted: Admit, now: dt.datetime, age_days: float) -> None:
    enrolled = now - age_days * DAY
    with pytest.raises(EbbflowError) as caught:
        Identity(enrolled).check(admitted(), now)
    assert caught.value.reason is Reason.IDENTITY_WAITS
    first = max(enrolled + 30 * DAY, window_start("2026-12-03")) if age_days < 7 else enrolled + 30 * DAY
    assert caught.value.metadata["first"] == first.isoformat()


def test_an_old_identity_and_a_new_device_do_not_wait(admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    Identity(now - 30 * DAY).check(plan, now)
    Identity(now, new_device=True).check(plan, now)
    Identity().check(plan, now)


def test_a_window_of_the_device_that_began_too_early_keeps_a_new_identity_silent(admitted: Admit) -> None:
    """A window of 29 days begins on 2026-11-07, one of 30 days on 2026-12-03."""
    now = window_start("2026-12-04")
    plan = admitted(at=now, ceiling=Ceiling(window_days=29))
    assert (plan.plan.window, plan.device_window) == ("2026-12-03", "2026-11-07")
    with pytest.raises(EbbflowError):
        Identity(window_start("2026-11-02")).check(plan, now)
    Identity(window_start("2026-10-31")).check(plan, now)


def plan_of(end: dt.datetime, days: int, device_days: int) -> AdmittedPlan:
    plan = pb.RoundPlan(window=window_name(end, days), policy=pb.PrivacyPolicy(window_days=days))
    plan.end_time.FromDatetime(end)
    return AdmittedPlan(plan, b"", window_name(end, device_days), 1, 1, device_days)


LENGTHS = st.tuples(st.integers(1, 60), st.integers(1, 60)).map(lambda days: (max(days), min(days)))
"""Of the student's windows and the device's, which are no longer."""


@settings(max_examples=1000)
@given(
    st.integers(20_000, 21_000).map(lambda days: dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + days * DAY),
    LENGTHS,
    LENGTHS,
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(0, 3),
)
def test_no_window_of_a_new_identity_holds_a_charge_of_the_one_before(
    opened: dt.datetime, before: tuple[int, int], after: tuple[int, int], open_days: int, age_days: int, late: int
) -> None:
    """Whatever lengths the windows of both had; the old identity answers as early as it may."""
    old = plan_of(opened + min(open_days, before[0]) * DAY, *before)
    enrolled = max(opened, old.answer_from) + TICK
    now = enrolled + age_days * DAY
    new = plan_of(now + min(late, after[0]) * DAY + TICK, *after)
    try:
        Identity(enrolled).check(new, now)
    except EbbflowError:
        return
    for window, days in ((new.plan.window, after[0]), (new.device_window, after[1])):
        assert not window_start(window) <= old.end_time < window_end(window, days)


def test_a_policy_with_other_windows_renews_nothing_for_a_new_identity() -> None:
    """The old one was charged until 2027-01-05, in a window of 366 days; windows of 30 days begin on 2027-01-02."""
    answered = dt.datetime(2026, 12, 30, 4, tzinfo=dt.UTC)
    old, new = Identity(), Identity(answered)

    def ask(at: dt.datetime, days: int, version: int, length: dt.timedelta) -> AdmittedPlan:
        policy = signed_policy(pb.PrivacyPolicy(window_days=days), version=version)
        plan = make_plan("r1", "faq", policy, [pb.Bin(bin_id="a", texts=["a"])], Timing(at, length, DAY))
        keys = {SIGNER.public_key.keyid: SIGNER.public_key}
        return admit(PlanSigner(SIGNER).sign(plan), keys, Ceiling(window_days=7), at)

    long_ago = ask(answered, 366, 1, 6 * DAY)
    assert answered >= long_ago.answer_from
    old.check(long_ago, answered)
    for at, waits in ((answered + 31 * DAY, True), (dt.datetime(2027, 2, 1, tzinfo=dt.UTC), False)):
        plan = ask(at, 30, 2, DAY / 4)
        assert (window_start(plan.plan.window) <= long_ago.end_time) == waits
        if waits:
            with pytest.raises(EbbflowError):
                new.check(plan, at)
        else:
            new.check(plan, at)


def test_the_account_itself_refuses_what_comes_too_early(tmp_path: Path, admitted: Admit, now: dt.datetime) -> None:
    store = FeedbackStore(tmp_path / "agent.db", identity=Identity(now - DAY))
    calls = (
        lambda: store.check(admitted(), now),
        lambda: store.release_batch(admitted(), [], lambda _: b"", now),
    )
    for call in calls:
        with pytest.raises(EbbflowError) as caught:
            call()
        assert caught.value.reason is Reason.IDENTITY_WAITS
    store.close()
    fresh = FeedbackStore(tmp_path / "agent.db")
    with pytest.raises(EbbflowError) as caught:
        fresh.release_batch(admitted(), [], lambda _: b"", now - 7 * DAY)
    assert caught.value.metadata["why"] == "early"
    assert fresh.accounts() == []
    assert fresh.release_batch(admitted(), [], lambda _: b"", now - 6 * DAY)
    fresh.close()
