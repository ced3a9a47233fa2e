"""Caps that hold over windows, students, copies of the device and changed policies."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
from feedback_world import signed_policy
from securesystemslib.signer import CryptoSigner, Key

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.accounting import epsilon_of, rho_nano_cap
from ebbflow.common.privacy.calibration import complete_policy, with_lifetime
from ebbflow.edge.feedback.budgets import MAX_CHARGE_NANO
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore

DAY = dt.timedelta(days=1)
Admit = Callable[..., AdmittedPlan]
Ask = Callable[..., AdmittedPlan]


def reason_of(call: Callable[[], object]) -> tuple[Reason, str]:
    with pytest.raises(EbbflowError) as caught:
        call()
    return caught.value.reason, caught.value.metadata.get("why", "")


def sign(data: bytes) -> bytes:
    return data[:8]


@pytest.fixture
def ask(signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime) -> Ask:
    """Makes and admits a plan under any policy."""

    def ask(
        round_id: str,
        policy: pb.PrivacyPolicy | None = None,
        at: dt.datetime = now,
        version: int = 1,
        ceiling: Ceiling | None = None,
    ) -> AdmittedPlan:
        document = pb.PolicyDocument(
            student="students/faq", version=version, policy=policy or complete_policy(pb.PrivacyPolicy())
        )
        signed = PlanSigner(signer).sign_policy(document)
        bins = [pb.Bin(bin_id="files", texts=["files"])]
        plan = make_plan(round_id, "faq", signed, bins, Timing(at, DAY, DAY))
        return admit(PlanSigner(signer).sign(plan), keys, ceiling or Ceiling(), at)

    return ask


def mirrored(plan: AdmittedPlan, rho_nano: int = 0, round_: str = "") -> pb.MirroredCharge:
    asked = plan.plan
    charge = pb.MirroredCharge(
        round=round_ or asked.round,
        student=asked.student,
        window=asked.window,
        rho_nano=rho_nano or asked.mechanism.rho_nano,
    )
    charge.end_time.CopyFrom(asked.end_time)
    return charge


def test_what_the_cloud_knows_of_is_charged_and_never_answered_again(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    plans = [admitted(round_id=f"r{number}") for number in range(6)]
    assert store.take_over([mirrored(plan) for plan in plans[:3]], now) == 3
    assert store.take_over([mirrored(plan) for plan in plans[:3]], now) == 0
    assert store.has_answered("rounds/r0")
    assert reason_of(lambda: store.release_batch(plans[0], [], sign, now)) == (Reason.PLAN_INVALID, "answered")
    store.release_batch(plans[3], [], sign, now)
    assert reason_of(lambda: store.release_batch(plans[4], [], sign, now))[0] is Reason.BUDGET_EXHAUSTED
    [account] = store.accounts()
    assert (account.entries, account.epsilon) == (4, 4.0)


@pytest.mark.parametrize(("epsilon", "rounds"), [(4.0, 4), (8.0, 1), (16.0, 4)])
def test_what_a_full_window_leaves_of_rho_is_not_for_another_student(
    store: FeedbackStore, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime, epsilon: float, rounds: int
) -> None:
    """Rounds of one cost are within epsilon exactly; what their rho leaves would make 8.13 of 8, with cheap rounds."""
    ceiling = Ceiling(epsilon=epsilon)

    def ask(round_id: str, student: str, policy: pb.PrivacyPolicy) -> AdmittedPlan:
        bins = [pb.Bin(bin_id="files", texts=["files"])]
        plan = make_plan(round_id, student, signed_policy(policy, student, signer), bins, Timing(now, DAY, DAY))
        return admit(PlanSigner(signer).sign(plan), keys, ceiling, now)

    for number in range(rounds):
        store.release_batch(
            ask(f"r{number}", "faq", pb.PrivacyPolicy(epsilon=epsilon, rounds_per_window=rounds)), [], sign, now
        )
    cheap = ask("cheap", "poetry", pb.PrivacyPolicy(epsilon=0.05))
    assert store.device_spent_nano("2026-11-03", 30) + cheap.plan.mechanism.rho_nano <= ceiling.rho_cap_nano
    assert reason_of(lambda: store.release_batch(cheap, [], sign, now))[0] is Reason.BUDGET_EXHAUSTED


def test_students_of_several_policies_share_a_window_while_they_are_within_it(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    for number, (student, epsilon) in enumerate([("faq", 2.0), ("poetry", 1.0), ("news", 2.0), ("faq", 2.0)] * 2):
        plan = admitted(round_id=f"r{number}", student=student, epsilon=epsilon)
        store.release_batch(plan, [], sign, now)
    assert epsilon_of(store.device_spent_nano("2026-11-03", 30), 1e-6) > 2.6


def test_the_larger_of_both_accounts_counts(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    sent = store.release_batch(plan, [], sign, now)
    cost = plan.plan.mechanism.rho_nano
    assert store.take_over([mirrored(plan, cost - 1)], now) == 0
    assert store.lifetime_spent_nano() == cost
    assert store.take_over([mirrored(plan, cost + 5)], now) == 1
    assert store.lifetime_spent_nano() == cost + 5
    assert store.release_batch(plan, [], sign, now) == sent


def test_what_the_cloud_has_of_a_round_is_not_sent_again(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    """A restored disk may hold another batch for it, with other noise."""
    first, second = admitted(round_id="r1"), admitted(round_id="r2")
    for plan in (first, second):
        store.release_batch(plan, [], sign, now)
    store.take_over([mirrored(first)], now)
    assert [waiting.round for waiting in store.pending(now)] == ["rounds/r2"]


def test_a_disk_of_the_past_sends_nothing_that_waited(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    """It holds four batches; another four were sent since, by the disk that is gone. Together they pass the cap."""
    for number in range(4):
        store.release_batch(admitted(round_id=f"old{number}"), [], sign, now)
    store.take_over([mirrored(admitted(round_id=f"new{number}")) for number in range(4)], now)
    assert store.pending(now) == []
    assert store.accounts()[0].entries == 8


def test_an_account_that_only_the_cloud_told_of_is_shown(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    store.take_over([mirrored(admitted())], now)
    [account] = store.accounts()
    assert account.rho_spent_nano == account.rho_cap_nano
    assert epsilon_of(account.rho_spent_nano, account.delta) > 0


@pytest.mark.parametrize(
    "change",
    [
        {"round": "r1"},
        {"student": "faq"},
        {"window": "soon"},
        {"rho_nano": 0},
        {"end_time": None},
    ],
)
def test_charges_that_make_no_sense_stop_everything(
    store: FeedbackStore, admitted: Admit, now: dt.datetime, change: dict[str, str | int | None]
) -> None:
    good, bad = mirrored(admitted(round_id="r1")), mirrored(admitted(round_id="r2"))
    for field, value in change.items():
        bad.ClearField(field)  # type: ignore[arg-type]
        if value:
            setattr(bad, field, value)
    assert reason_of(lambda: store.take_over([good, bad], now)) == (Reason.PLAN_INVALID, "charges")
    assert store.lifetime_spent_nano() == 0


def test_charges_beyond_all_measure_stay_countable(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    charges = [mirrored(plan, 2**64 - 1, f"rounds/x{number}") for number in range(2000)]
    assert store.take_over(charges, now) == 2000
    assert store.lifetime_spent_nano() == 2000 * MAX_CHARGE_NANO
    assert reason_of(lambda: store.release_batch(plan, [], sign, now))[0] is Reason.BUDGET_EXHAUSTED


def test_the_lifetime_of_a_policy_ends_for_good(store: FeedbackStore, ask: Ask, now: dt.datetime) -> None:
    policy = with_lifetime(pb.PrivacyPolicy(epsilon=2.0), 3.0)
    reasons = []
    for number in range(16):
        at = now + 30 * DAY * (number // 4)
        try:
            store.release_batch(ask(f"r{number}", policy, at), [], sign, at)
        except EbbflowError as error:
            reasons.append(error.reason)
    assert set(reasons) == {Reason.LIFETIME_EXHAUSTED}
    assert len(reasons) < 12
    assert epsilon_of(store.lifetime_spent_nano("faq"), policy.delta) <= 3.0


def test_the_lifetime_of_the_device_ends_over_all_students(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    ceiling = Ceiling(epsilon=4.0, lifetime_epsilon=5.0)
    reasons = set()
    for number in range(12):
        at = now + 30 * DAY * (number // 4)
        plan = admitted(round_id=f"r{number}", student=("faq", "poetry")[number % 2], ceiling=ceiling, at=at)
        try:
            store.release_batch(plan, [], sign, at)
        except EbbflowError as error:
            reasons.add(error.reason)
    assert reasons == {Reason.LIFETIME_EXHAUSTED}
    assert rho_nano_cap(4.0, 1e-6) < store.lifetime_spent_nano() <= rho_nano_cap(5.0, 1e-6)


def test_a_window_of_another_length_renews_nothing(store: FeedbackStore, ask: Ask, now: dt.datetime) -> None:
    """Otherwise a cloud would change the policy's window_days by one each time that a budget is spent."""
    wide = Ceiling(epsilon=64.0)
    for number in range(4):
        store.release_batch(ask(f"r{number}", ceiling=wide), [], sign, now)
    longer = complete_policy(pb.PrivacyPolicy(window_days=31))
    plan = ask("r4", longer, version=2, ceiling=wide)
    assert plan.plan.window != ask("r0").plan.window
    assert reason_of(lambda: store.release_batch(plan, [], sign, now))[0] is Reason.BUDGET_EXHAUSTED


def test_a_window_of_the_past_is_not_charged_after_the_clock_was_set_back(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    store.release_batch(admitted(round_id="r1"), [], sign, now)
    long_ago = now - 31 * DAY
    earlier = admitted(round_id="r0", at=long_ago)
    assert reason_of(lambda: store.release_batch(earlier, [], sign, long_ago))[0] is Reason.ROUND_CLOSED
    yesterday = now - DAY / 2
    store.release_batch(admitted(round_id="r2", at=yesterday), [], sign, yesterday)


def test_a_charge_that_the_cloud_tells_of_moves_no_clock(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    store.take_over([mirrored(admitted(round_id="r1", at=now + 300 * DAY))], now + 300 * DAY)
    store.release_batch(admitted(round_id="r2"), [], sign, now)


def test_a_policy_that_was_replaced_does_not_come_back(
    tmp_path: Path, store: FeedbackStore, ask: Ask, now: dt.datetime
) -> None:
    first, last = (complete_policy(pb.PrivacyPolicy(epsilon=epsilon)) for epsilon in (1.0, 2.0))
    store.release_batch(ask("r1", first, version=1), [], sign, now)
    store.release_batch(ask("r2", last, version=3), [], sign, now)
    old = ask("r3", first, version=2)
    assert reason_of(lambda: store.release_batch(old, [], sign, now)) == (Reason.PLAN_INVALID, "policy_version")
    other = ask("r4", complete_policy(pb.PrivacyPolicy(epsilon=1.5)), version=3)
    assert reason_of(lambda: store.check(other, now)) == (Reason.PLAN_INVALID, "policy_changed")
    assert store.policies()["faq"] == (3, last)
    again = FeedbackStore(tmp_path / "agent.db")
    assert reason_of(lambda: again.check(old, now)) == (Reason.PLAN_INVALID, "policy_version")
    again.close()


def test_a_policy_is_remembered_from_a_plan_that_was_not_answered(
    store: FeedbackStore, ask: Ask, now: dt.datetime
) -> None:
    newer = ask("r1", complete_policy(pb.PrivacyPolicy(epsilon=1.0)), version=2)
    store.decline(pb.SignedPlan.FromString(newer.signed_plan), Reason.IDENTITY_WAITS, newer, now)
    assert reason_of(lambda: store.check(ask("r2"), now)) == (Reason.PLAN_INVALID, "policy_version")


def test_a_student_of_one_policy_says_nothing_about_another(
    store: FeedbackStore, signer: CryptoSigner, keys: dict[str, Key], admitted: Admit, now: dt.datetime
) -> None:
    store.release_batch(admitted(), [], sign, now)
    lower = signed_policy(pb.PrivacyPolicy(epsilon=1.0), "poetry", signer, 1)
    bins = [pb.Bin(bin_id="files", texts=["files"])]
    plan = make_plan("r9", "poetry", lower, bins, Timing(now, DAY, DAY))
    store.check(admit(PlanSigner(signer).sign(plan), keys, Ceiling(epsilon=8.0), now), now)


@pytest.mark.parametrize("lifetime", [3.9, -1.0, float("inf"), float("nan")])
def test_a_lifetime_that_makes_no_sense_is_refused(lifetime: float) -> None:
    assert reason_of(lambda: Ceiling(epsilon=4.0, lifetime_epsilon=lifetime))[0] is Reason.CONFIG_INVALID
