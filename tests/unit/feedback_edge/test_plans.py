"""A device answers only plans that are signed, sound and within its own ceiling."""

import datetime as dt
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
from feedback_world import NOW
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from list_costs import cost_nano
from securesystemslib.signer import CryptoSigner, Key

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.accounting import gaussian_epsilon
from ebbflow.common.privacy.calibration import complete_policy
from ebbflow.common.privacy.windows import window_name
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling, admit

Make = Callable[..., pb.RoundPlan]
Admit = Callable[..., AdmittedPlan]


def reason_of(call: Callable[[], object]) -> Reason:
    with pytest.raises(EbbflowError) as caught:
        call()
    return caught.value.reason


def test_a_sound_plan_is_admitted(admitted: Admit) -> None:
    plan = admitted()
    assert plan.student_id == "faq"
    assert plan.device_window == plan.plan.window
    assert plan.device_cap_nano >= plan.plan.policy.rho_cap_nano


def test_a_plan_is_answered_within_a_week_of_its_end(admitted: Admit) -> None:
    plan = admitted()
    assert plan.end_time == NOW + dt.timedelta(days=1)
    assert plan.answer_from == NOW - dt.timedelta(days=6)


@pytest.mark.parametrize("field", ["start_time", "end_time"])
@pytest.mark.parametrize("seconds", [10**15, -(10**15), 2**63 - 1])
def test_a_plan_whose_times_no_calendar_holds_is_refused(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime, field: str, seconds: int
) -> None:
    plan = make()
    getattr(plan, field).seconds = seconds
    assert reason_of(lambda: admit(PlanSigner(signer).sign(plan), keys, Ceiling(), now)) is Reason.PLAN_INVALID


def test_a_plan_by_another_key_is_untrusted(make: Make, keys: dict[str, Key], now: dt.datetime) -> None:
    signed = PlanSigner(CryptoSigner.generate_ed25519()).sign(make())
    assert reason_of(lambda: admit(signed, keys, Ceiling(), now)) is Reason.PLAN_UNTRUSTED


def test_a_known_key_id_does_not_make_a_signature_good(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime
) -> None:
    signed = PlanSigner(CryptoSigner.generate_ed25519()).sign(make())
    signed.key_id = signer.public_key.keyid
    assert reason_of(lambda: admit(signed, keys, Ceiling(), now)) is Reason.PLAN_UNTRUSTED


@pytest.mark.parametrize("field", ["plan", "signature"])
def test_a_changed_byte_makes_a_plan_untrusted(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime, field: str
) -> None:
    signed = PlanSigner(signer).sign(make())
    changed = bytearray(getattr(signed, field))
    changed[7] ^= 1
    setattr(signed, field, bytes(changed))
    assert reason_of(lambda: admit(signed, keys, Ceiling(), now)) is Reason.PLAN_UNTRUSTED


def test_a_signed_lie_is_still_a_lie(make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime) -> None:
    plan = make()
    plan.mechanism.sigma_squared_denominator *= 4
    signed = PlanSigner(signer).sign(plan)
    assert reason_of(lambda: admit(signed, keys, Ceiling(), now)) is Reason.PLAN_INVALID


@pytest.mark.parametrize(
    "ceiling",
    [Ceiling(epsilon=1.0), Ceiling(delta=1e-7), Ceiling(window_days=31), Ceiling(epsilon=3.99)],
    ids=["epsilon", "delta", "days", "slightly"],
)
def test_a_plan_above_the_ceiling_is_refused(admitted: Admit, ceiling: Ceiling) -> None:
    assert reason_of(lambda: admitted(ceiling=ceiling)) is Reason.POLICY_TOO_WEAK


def test_a_plan_that_is_over_is_not_answered(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime
) -> None:
    signed = PlanSigner(signer).sign(make())
    late = now + dt.timedelta(days=1)
    assert reason_of(lambda: admit(signed, keys, Ceiling(), late)) is Reason.ROUND_CLOSED


def test_a_plan_for_a_far_window_cannot_spend_it_now(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime
) -> None:
    signed = PlanSigner(signer).sign(make(at=now + dt.timedelta(days=60)))
    assert reason_of(lambda: admit(signed, keys, Ceiling(), now)) is Reason.PLAN_INVALID


def test_bytes_that_are_no_plan_are_refused(signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime) -> None:
    signature = signer.sign(b"\xff\xff")
    signed = pb.SignedPlan(
        plan=b"\xff\xff", signature=bytes.fromhex(signature.signature), key_id=signer.public_key.keyid
    )
    assert reason_of(lambda: admit(signed, keys, Ceiling(), now)) is Reason.PLAN_INVALID


@pytest.mark.parametrize("field", [{"epsilon": 0.0}, {"delta": 0.5}, {"window_days": 0}], ids=str)
def test_a_ceiling_that_makes_no_sense_is_refused(field: dict[str, float]) -> None:
    assert reason_of(lambda: Ceiling(**field)) is Reason.CONFIG_INVALID  # type: ignore[arg-type]


def test_the_ceiling_covers_the_policy_of_the_same_epsilon() -> None:
    for epsilon in (0.5, 1.0, 4.0, 8.0):
        policy = complete_policy(pb.PrivacyPolicy(epsilon=epsilon))
        assert policy.rho_cap_nano <= Ceiling(epsilon=epsilon).rho_cap_nano


# What its owner signed


def with_policy(plan: pb.RoundPlan, signer: CryptoSigner, **changes: object) -> pb.RoundPlan:
    """A plan whose policy was signed with other words."""
    document = pb.PolicyDocument.FromString(plan.signed_policy.document)
    for field, value in changes.items():
        setattr(document, field, value)
    plan.signed_policy.CopyFrom(PlanSigner(signer).sign_policy(document))
    return plan


def test_a_plan_says_which_version_of_the_policy_it_obeys(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime
) -> None:
    plan = with_policy(make(), signer, version=7, note="after the review")
    assert admit(PlanSigner(signer).sign(plan), keys, Ceiling(), now).policy_version == 7


def test_a_policy_that_nobody_signed_is_untrusted(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime
) -> None:
    missing, strange = make(), with_policy(make(), CryptoSigner.generate_ed25519())
    missing.ClearField("signed_policy")
    for plan in map(PlanSigner(signer).sign, (missing, strange)):
        assert reason_of(partial(admit, plan, keys, Ceiling(), now)) is Reason.PLAN_UNTRUSTED


@pytest.mark.parametrize("changes", [{"version": 0}, {"student": "students/other"}], ids=str)
def test_a_policy_for_something_else_is_refused(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime, changes: dict[str, object]
) -> None:
    plan = with_policy(make(), signer, **changes)
    assert reason_of(lambda: admit(PlanSigner(signer).sign(plan), keys, Ceiling(), now)) is Reason.PLAN_INVALID


@pytest.mark.parametrize(
    "field", ["retention_days", "lifetime_rho_cap_nano", "rounds_per_window", "rho_cap_nano"], ids=str
)
def test_a_plan_that_says_another_policy_than_was_signed_is_refused(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime, field: str
) -> None:
    plan = make()
    setattr(plan.policy, field, getattr(plan.policy, field) + 1)
    assert reason_of(lambda: admit(PlanSigner(signer).sign(plan), keys, Ceiling(), now)) is Reason.PLAN_INVALID


def adapter_plan(plan: pb.RoundPlan, signer: CryptoSigner) -> pb.RoundPlan:
    """A sound plan for adapter updates of 8 values."""
    plan = with_policy(plan, signer)
    document = pb.PolicyDocument.FromString(plan.signed_policy.document)
    document.policy.allow_adapters = plan.policy.allow_adapters = True
    plan.signed_policy.CopyFrom(PlanSigner(signer).sign_policy(document))
    adapter = pb.AdapterPlan(release=1, rank=1, modules=["q_proj"], dimension=8, clip_norm=1.0, scale=16, steps=1)
    adapter.batch_size, adapter.sequence_length, adapter.learning_rate, adapter.users_per_agent = 1, 8, 0.1, 1
    timing = Timing(NOW, dt.timedelta(days=1), dt.timedelta(days=7))
    return make_plan("r1", "faq", plan.signed_policy, [], timing, adapter=adapter)


def test_adapter_updates_are_declined_unless_the_device_allows_them(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime
) -> None:
    signed = PlanSigner(signer).sign(adapter_plan(make(), signer))
    assert reason_of(lambda: admit(signed, keys, Ceiling(), now)) is Reason.POLICY_TOO_WEAK
    assert admit(signed, keys, Ceiling(adapters=True), now).plan.adapter.dimension == 8


def test_what_the_owner_did_not_sign_or_the_ceiling_forbids_is_refused_before_any_arithmetic(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime
) -> None:
    plan = make()
    plan.mechanism.rho_nano += 1  # which the arithmetic would find
    other = with_policy(plan, CryptoSigner.generate_ed25519())
    assert reason_of(lambda: admit(PlanSigner(signer).sign(other), keys, Ceiling(), now)) is Reason.PLAN_UNTRUSTED
    low = PlanSigner(signer).sign(with_policy(plan, signer))
    assert reason_of(lambda: admit(low, keys, Ceiling(epsilon=1.0), now)) is Reason.POLICY_TOO_WEAK
    assert reason_of(lambda: admit(low, keys, Ceiling(), now)) is Reason.PLAN_INVALID


# A cloud that holds the keys and lies

LIES = st.fixed_dictionaries(
    {"honest_cost": st.booleans()},
    optional={
        "sigma_squared_numerator": st.integers(0, 2000),
        "sigma_squared_denominator": st.integers(0, 40),
        "sensitivity_squared": st.integers(0, 20),
        "rho_nano": st.integers(0, 10**9),
        "epsilon": st.floats(0.5, 4.5) | st.sampled_from([0.0, float("nan"), 64.0]),
        "delta": st.sampled_from([0.0, 1e-9, 1e-7, 1e-6, 1e-5, 0.5]),
        "rounds_per_window": st.integers(0, 12),
        "window_days": st.sampled_from([0, 29, 30, 31, 366]),
        "rho_cap_nano": st.integers(0, 10**9),
        "cap": st.integers(0, 5),
    },
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example({"sigma_squared_numerator": 1, "honest_cost": True})
@example({"honest_cost": False, "cap": 3})
@example({"honest_cost": True, "rounds_per_window": 1})
@example({"honest_cost": True, "rounds_per_window": 5})
@given(LIES)
def test_whatever_is_signed_a_window_costs_no_more_than_the_ceiling(
    make: Make, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime, lies: dict[str, Any]
) -> None:
    """The costs are computed anew here, from the variance alone."""
    plan = lying(make(), signer, dict(lies))
    try:
        admitted = admit(PlanSigner(signer).sign(plan), keys, Ceiling(), now)
    except EbbflowError:
        return
    mechanism, policy = admitted.plan.mechanism, admitted.plan.policy
    variance = Fraction(mechanism.sigma_squared_numerator, mechanism.sigma_squared_denominator)
    change = 1 + sum(metric.cap**2 for metric in admitted.plan.metrics)
    true_rho = Fraction(change) / (2 * variance)
    assert mechanism.rho_nano >= true_rho * 10**9
    assert gaussian_epsilon(float(true_rho) * policy.rounds_per_window, 1e-6) <= 4.0 + 1e-6
    assert policy.window_days >= 30
    assert admitted.device_cap_nano == Ceiling().rho_cap_nano


def lying(plan: pb.RoundPlan, signer: CryptoSigner, lies: dict[str, Any]) -> pb.RoundPlan:
    """A plan with these words; an honest cost fits them, so that what is left to find is the claim."""
    honest, cap = lies.pop("honest_cost"), lies.pop("cap", 0)
    for field, value in lies.items():
        message = plan.mechanism if field in pb.Mechanism.DESCRIPTOR.fields_by_name else plan.policy
        setattr(message, field, value)
    if cap:
        plan.metrics.add(kind=pb.Metric.KIND_ACCEPTED, cap=cap)
    mechanism = plan.mechanism
    if honest and mechanism.sigma_squared_numerator and mechanism.sigma_squared_denominator:
        variance = Fraction(mechanism.sigma_squared_numerator, mechanism.sigma_squared_denominator)
        mechanism.sensitivity_squared = 1 + cap * cap
        mechanism.rho_nano = cost_nano(variance, 1 + cap * cap)
        plan.policy.rho_cap_nano = lies.get("rho_cap_nano", mechanism.rho_nano * plan.policy.rounds_per_window)
    if plan.policy.window_days:
        plan.window = window_name(plan.end_time.ToDatetime(dt.UTC), plan.policy.window_days)
    document = pb.PolicyDocument.FromString(plan.signed_policy.document)
    document.policy.CopyFrom(plan.policy)
    plan.signed_policy.CopyFrom(PlanSigner(signer).sign_policy(document))
    return plan
