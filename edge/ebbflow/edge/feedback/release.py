"""The one place where users' votes become something that may leave the device."""

import uuid
from collections.abc import Callable, Collection

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.gaussian import SAMPLER, DiscreteGaussian
from ebbflow.common.privacy.vector import Contribution, add_up, layout_of, metric_caps, value_limits
from ebbflow.edge.feedback.plans import AdmittedPlan


def privatise(plan: pb.RoundPlan, contributions: Collection[Contribution]) -> list[int]:
    """Adds users up, adds noise to every cell, and cuts cells that are beyond the plan's limits.

    The cut comes after the noise, so it costs nothing.
    """
    layout = layout_of(plan)
    noise = DiscreteGaussian(variance_of(plan.mechanism)).sample(layout.length)
    votes = add_up(layout, metric_caps(plan), contributions)
    least, most = value_limits(plan)
    noisy = (vote + error for vote, error in zip(votes, noise, strict=True))
    return [min(max(value, least), limit) for value, limit in zip(noisy, most, strict=True)]


def make_batch(
    admitted: AdmittedPlan, contributions: Collection[Contribution], sign: Callable[[bytes], bytes]
) -> tuple[str, bytes]:
    """Makes a batch with fresh noise; returns its id and the bytes of a SignedBatch.

    Never call it twice for one round: the ledger does, and keeps what it returned.

    Args:
        admitted: the plan.
        contributions: one for each user.
        sign: signs with the key of the agent's certificate.
    """
    batch = pb.FeedbackBatch(
        batch_id=str(uuid.uuid4()),
        round=admitted.plan.round,
        plan_sha256=admitted.plan_sha256,
        mechanism=admitted.plan.mechanism,
        noisy=privatise(admitted.plan, contributions),
        sampler=SAMPLER,
    )
    data = batch.SerializeToString(deterministic=True)
    signed = pb.SignedBatch(batch=data, signature=sign(data))
    return batch.batch_id, signed.SerializeToString(deterministic=True)
