"""What the cloud turns down, and the one word by which each refusal is kept. Nothing here touches disk or network.

A refused batch is never stored: one with too little noise is raw user data.
"""

import enum
import uuid

from google.protobuf.message import DecodeError

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.gaussian import SAMPLER, probabilities, tail
from ebbflow.common.privacy.vector import layout_of, value_limits

SAMPLERS = frozenset({SAMPLER})
FALSE_ALARM = 1e-6
"""Probability at most by which a correct batch is refused, for each statistical check."""
MAX_BATCH_BYTES = 256 * 1024
"""An adapter update of 65,536 values takes 200 KB, votes over 256 bins 2 KB."""


class Refusal(enum.StrEnum):
    """Why a batch was turned down."""

    MALFORMED = "malformed"
    UNKNOWN_FIELDS = "unknown_fields"
    BATCH_ID = "batch_id"
    SIGNATURE = "signature"
    ROUND_UNKNOWN = "round_unknown"
    ROUND_CLOSED = "round_closed"
    NOT_A_MEMBER = "not_a_member"
    PLAN_MISMATCH = "plan_mismatch"
    MECHANISM_MISMATCH = "mechanism_mismatch"
    SAMPLER = "sampler"
    LENGTH = "length"
    VALUE_RANGE = "value_range"
    NO_NEGATIVES = "no_negatives"
    UNDER_NOISED = "under_noised"
    NOISE_REUSED = "noise_reused"
    REPLAY = "replay"
    BUDGET = "budget"
    LIFETIME = "lifetime"
    BASE_RELEASE = "base_release"


_REASONS = {
    Refusal.ROUND_UNKNOWN: Reason.ROUND_NOT_FOUND,
    Refusal.ROUND_CLOSED: Reason.ROUND_CLOSED,
    Refusal.BUDGET: Reason.BUDGET_EXHAUSTED,
    Refusal.LIFETIME: Reason.LIFETIME_EXHAUSTED,
}


def refused(refusal: Refusal, message: str) -> EbbflowError:
    """Returns the error for one refusal; `metadata["why"]` is its word."""
    return EbbflowError(_REASONS.get(refusal, Reason.BATCH_REFUSED), message, why=refusal.value)


def parse_batch(data: bytes) -> pb.FeedbackBatch:
    """Reads a batch strictly: whatever the schema does not know is refused, for it could carry raw data.

    Raises:
        EbbflowError: BATCH_REFUSED.
    """
    batch = pb.FeedbackBatch()
    try:
        if len(data) > MAX_BATCH_BYTES:
            raise DecodeError
        batch.ParseFromString(data)
    except DecodeError:
        raise refused(Refusal.MALFORMED, "the batch cannot be read") from None
    known = pb.FeedbackBatch()
    known.CopyFrom(batch)
    known.DiscardUnknownFields()  # type: ignore[no-untyped-call,unused-ignore]
    if known.SerializeToString(deterministic=True) != data:
        raise refused(Refusal.UNKNOWN_FIELDS, "the batch holds fields that its schema does not have")
    if not _is_uuid(batch.batch_id):
        raise refused(Refusal.BATCH_ID, "batch_id must be a UUID")
    return batch


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _negatives_are_certain(plan: pb.RoundPlan) -> bool:
    """Whether null bins that are all zero or more have a probability below FALSE_ALARM (very small sigma: they may)."""
    variance = variance_of(plan.mechanism)
    at_zero = probabilities(float(variance), tail(variance))[tail(variance)]
    return ((1 + at_zero) / 2) ** plan.null_bins < FALSE_ALARM


def _takes_release(plan: pb.RoundPlan, number: int) -> bool:
    """Whether a batch may name this release; 0 stands for votes, or for an update of noise alone."""
    newest, oldest = plan.adapter.release, plan.adapter.release - plan.adapter.max_staleness
    return not number or (plan.HasField("adapter") and oldest <= number <= newest)


def check_batch(plan: pb.RoundPlan, plan_sha256: bytes, batch: pb.FeedbackBatch) -> None:
    """Checks what one batch says against the plan of its round.

    What needs statistics or other batches (null bins, reused noise, budget) is checked in `cloud.feedback`.

    Args:
        plan: plan of the round that the batch names.
        plan_sha256: hash of the plan's signed bytes.
        batch: as `parse_batch` returned it.

    Raises:
        EbbflowError: BATCH_REFUSED, with the refusal's word in `metadata["why"]`.
    """
    if batch.plan_sha256 != plan_sha256:
        raise refused(Refusal.PLAN_MISMATCH, "the batch answers another plan")
    if batch.mechanism != plan.mechanism:
        raise refused(Refusal.MECHANISM_MISMATCH, "the batch was made with another mechanism than the plan's")
    if batch.sampler not in SAMPLERS:
        raise refused(Refusal.SAMPLER, "the batch's noise is from a sampler that is not known")
    if len(batch.noisy) != layout_of(plan).length:
        raise refused(Refusal.LENGTH, "the batch has not as many values as the plan asks for")
    if not _takes_release(plan, batch.base_release):
        raise refused(Refusal.BASE_RELEASE, "the batch changes a release that the plan does not take")
    least, most = value_limits(plan)
    if any(not low <= value <= high for low, value, high in zip(least, batch.noisy, most, strict=True)):
        raise refused(Refusal.VALUE_RANGE, "a value is beyond what the plan's users and noise can give")
    if min(batch.noisy) >= 0 and _negatives_are_certain(plan):
        raise refused(Refusal.NO_NEGATIVES, "a batch with noise has negative values; this one has none")
