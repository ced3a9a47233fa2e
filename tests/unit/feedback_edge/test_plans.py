"""A device answers only plans that are signed, sound and within its own ceiling."""

import datetime as dt
from collections.abc import Callable

import pytest
from securesystemslib.signer import CryptoSigner, Key

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import complete_policy
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
