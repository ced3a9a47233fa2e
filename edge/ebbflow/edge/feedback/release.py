"""Makes the one batch by which a device answers a round."""

import uuid
from collections.abc import Callable, Collection

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.gaussian import SAMPLER
from ebbflow.common.privacy.release import privatise
from ebbflow.common.privacy.vector import AdapterContribution, Contribution
from ebbflow.edge.feedback.plans import AdmittedPlan


def make_batch(
    admitted: AdmittedPlan,
    contributions: Collection[Contribution | AdapterContribution],
    sign: Callable[[bytes], bytes],
    base_release: int = 0,
) -> tuple[str, bytes]:
    """Makes a batch with fresh noise; returns its id and the bytes of a SignedBatch.

    Never call it twice for one round: the ledger does, and keeps what it returned.

    Args:
        admitted: the plan.
        contributions: one for each user.
        sign: signs with the key of the agent's certificate.
        base_release: of adapter updates, the release that they change.
    """
    batch = pb.FeedbackBatch(
        batch_id=str(uuid.uuid4()),
        round=admitted.plan.round,
        plan_sha256=admitted.plan_sha256,
        mechanism=admitted.plan.mechanism,
        noisy=privatise(admitted.plan, contributions),
        sampler=SAMPLER,
        base_release=base_release,
    )
    data = batch.SerializeToString(deterministic=True)
    signed = pb.SignedBatch(batch=data, signature=sign(data))
    return batch.batch_id, signed.SerializeToString(deterministic=True)
