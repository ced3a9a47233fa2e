"""Which plans this device answers: signed, sound, and within its own ceiling."""

import datetime as dt
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Key, Signature

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.accounting import rho_nano_cap
from ebbflow.common.privacy.calibration import (
    DEFAULT_DELTA,
    DEFAULT_EPSILON,
    DEFAULT_WINDOW_DAYS,
    check_target,
)
from ebbflow.common.privacy.plans import EPSILON_TOLERANCE, check_plan
from ebbflow.common.privacy.windows import AHEAD, window_name


@dataclass(frozen=True)
class Ceiling:
    """The most that this device gives away, for each user on it and each window, whatever any plan says.

    It holds over all students together. A window must be at least so long.
    """

    epsilon: float = DEFAULT_EPSILON
    delta: float = DEFAULT_DELTA
    window_days: int = DEFAULT_WINDOW_DAYS
    lifetime_epsilon: float = 0.0
    """Of all windows together, at the same delta; 0 sets no limit."""
    adapters: bool = False
    """Whether rounds may ask for adapter updates."""

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            EbbflowError: CONFIG_INVALID.
        """
        try:
            check_target(self.epsilon, self.delta, 1)
        except EbbflowError as error:
            raise EbbflowError(Reason.CONFIG_INVALID, f"the privacy ceiling's {error}") from None
        if self.window_days < 1:
            raise EbbflowError(Reason.CONFIG_INVALID, "the privacy ceiling's window_days must be at least 1")
        if self.lifetime_epsilon and not self.epsilon <= self.lifetime_epsilon < math.inf:
            message = "the privacy ceiling's lifetime_epsilon must be 0 or at least a window's epsilon"
            raise EbbflowError(Reason.CONFIG_INVALID, message)

    @property
    def rho_cap_nano(self) -> int:
        """What a window of the device may cost, in billionths of rho."""
        return rho_nano_cap(self.epsilon, self.delta)

    @property
    def lifetime_nano(self) -> int:
        """What all windows together may cost, in billionths of rho; 0 sets no limit."""
        return rho_nano_cap(self.lifetime_epsilon, self.delta) if self.lifetime_epsilon else 0


@dataclass(frozen=True)
class AdmittedPlan:
    """A plan that this device has agreed to answer. Only `admit` makes one.

    Attributes:
        plan: the plan; not to be changed.
        plan_sha256: hash of its signed bytes.
        device_window: window of the device's own ceiling that the round is charged to.
        device_cap_nano: what that window may cost.
        policy_version: of the signed policy; the ledger refuses one below the highest that it has seen.
        device_window_days: length of the device's own windows.
        device_lifetime_nano: what all windows of the device together may cost; 0 sets no limit.
        device_delta: the delta at which the device's own limits hold.
        signed_plan: a serialised SignedPlan, as it came, for the device's records.
    """

    plan: pb.RoundPlan
    plan_sha256: bytes
    device_window: str
    device_cap_nano: int
    policy_version: int
    device_window_days: int = DEFAULT_WINDOW_DAYS
    device_lifetime_nano: int = 0
    signed_plan: bytes = b""
    device_delta: float = DEFAULT_DELTA

    @property
    def student_id(self) -> str:
        """Id of the student whose users vote."""
        return names.parse(self.plan.student, "students")

    @property
    def start_time(self) -> dt.datetime:
        """Interactions from here on are voted with."""
        return self.plan.start_time.ToDatetime(dt.UTC)

    @property
    def end_time(self) -> dt.datetime:
        """When the cloud stops taking batches."""
        return self.plan.end_time.ToDatetime(dt.UTC)

    @property
    def answer_from(self) -> dt.datetime:
        """From when on the round may be answered.

        A charge that was made long ahead could meet one of the device's next identity, which waits for no longer than
        `first_report` says.
        """
        return self.end_time - AHEAD


def _verify(data: bytes, signature: bytes, key_id: str, keys: Mapping[str, Key], what: str) -> None:
    key = keys.get(key_id)
    if key is None:
        raise EbbflowError(Reason.PLAN_UNTRUSTED, f"no trusted key signed the {what}", key_id=key_id[:64])
    try:
        key.verify_signature(Signature(key_id, signature.hex()), data)
    except (UnverifiedSignatureError, VerificationError):
        raise EbbflowError(Reason.PLAN_UNTRUSTED, f"the {what}'s signature does not verify") from None


def _parse(data: bytes) -> pb.RoundPlan:
    try:
        return pb.RoundPlan.FromString(data)
    except DecodeError:
        raise EbbflowError(Reason.PLAN_INVALID, "the plan cannot be read", why="malformed") from None


def _policy_version(plan: pb.RoundPlan, keys: Mapping[str, Key]) -> int:
    """Returns the version of the plan's policy, once its owner's signature and its words are checked."""
    signed = plan.signed_policy
    _verify(signed.document, signed.signature, signed.key_id, keys, "plan's policy")
    try:
        document = pb.PolicyDocument.FromString(signed.document)
    except DecodeError:
        raise EbbflowError(Reason.PLAN_INVALID, "the plan's policy cannot be read", why="malformed") from None
    if document.policy != plan.policy or document.student != plan.student or not document.version:
        raise EbbflowError(Reason.PLAN_INVALID, "the plan says another policy than was signed", why="policy")
    return document.version


def _check_ceiling(plan: pb.RoundPlan, ceiling: Ceiling) -> None:
    policy = plan.policy
    within = (
        policy.epsilon <= ceiling.epsilon + EPSILON_TOLERANCE
        and policy.delta <= ceiling.delta
        and policy.window_days >= ceiling.window_days
    )
    if not within:
        asked = f"epsilon {policy.epsilon:g} at delta {policy.delta:g} for {policy.window_days} days"
        allowed = f"{ceiling.epsilon:g} at {ceiling.delta:g} for {ceiling.window_days} days"
        message = f"the plan asks for {asked}; this device allows {allowed}"
        raise EbbflowError(Reason.POLICY_TOO_WEAK, message)
    if plan.HasField("adapter") and not ceiling.adapters:
        raise EbbflowError(Reason.POLICY_TOO_WEAK, "the plan asks for adapter updates; this device allows none")


def admit(signed: pb.SignedPlan, keys: Mapping[str, Key], ceiling: Ceiling, now: dt.datetime) -> AdmittedPlan:
    """Decides whether this device answers a plan.

    Args:
        signed: as the cloud sent it.
        keys: keys by id that the verified TUF metadata delegates "feedback" to.
        ceiling: the device's own limit.
        now: the device's time.

    Raises:
        EbbflowError: PLAN_UNTRUSTED (signature), PLAN_INVALID (its numbers do not give what they claim, or its end is
            beyond the window's length from now), POLICY_TOO_WEAK (above the ceiling), ROUND_CLOSED (over already).
    """
    _verify(signed.plan, signed.signature, signed.key_id, keys, "plan")
    plan = _parse(signed.plan)
    version = _policy_version(plan, keys)
    _check_ceiling(plan, ceiling)
    check_plan(plan)
    end = plan.end_time.ToDatetime(dt.UTC)
    if end <= now:
        raise EbbflowError(Reason.ROUND_CLOSED, f"{plan.round} is over", round=plan.round)
    if end > now + dt.timedelta(days=plan.policy.window_days):
        raise EbbflowError(Reason.PLAN_INVALID, "the plan ends too far in the future", why="time")
    return AdmittedPlan(
        plan=plan,
        plan_sha256=hashlib.sha256(signed.plan).digest(),
        device_window=window_name(end, ceiling.window_days),
        device_cap_nano=ceiling.rho_cap_nano,
        policy_version=version,
        device_window_days=ceiling.window_days,
        device_lifetime_nano=ceiling.lifetime_nano,
        signed_plan=signed.SerializeToString(deterministic=True),
        device_delta=ceiling.delta,
    )
