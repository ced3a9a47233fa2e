"""What a round says: sums of privatised batches and the mixture they suggest. It is post-processing, and free."""

import math
from collections.abc import Iterable, Sequence

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.vector import layout_of

FAILED_BOOST = 2.0
"""A vote that failed weighs this many votes that did not: the next student should learn what this one cannot."""
FLOOR_SHARE = 0.1
"""Share of the mixture that is spread evenly, so that no topic is forgotten over one round."""
SIGNIFICANT = 3.0
"""Standard deviations from which a cell tells more than noise."""


def weights(
    seen: Sequence[float],
    failed: Sequence[float],
    *,
    failed_boost: float = FAILED_BOOST,
    floor_share: float = FLOOR_SHARE,
) -> list[float]:
    """Returns the share of each bin in the next mixture; they sum to 1.

    In proportion to seen + failed_boost · failed, where that is above zero, with `floor_share` of the whole spread
    evenly. Where nothing is above zero, every bin has the same share.

    Args:
        seen: estimated votes by bin whose answer was taken or not judged; may be negative.
        failed: estimated votes by bin whose answer failed; may be negative.
        failed_boost: weight of a failed vote.
        floor_share: between 0 and 1.
    """
    wanted = [max(0.0, taken + failed_boost * missed) for taken, missed in zip(seen, failed, strict=True)]
    whole, count = math.fsum(wanted), len(wanted)
    if whole <= 0:
        return [1 / count] * count
    return [floor_share / count + (1 - floor_share) * want / whole for want in wanted]


def is_informative(seen: Sequence[float], failed: Sequence[float], noise_std: float) -> bool:
    """Whether any cell, or both cells of a bin together, stand three standard deviations above zero."""
    cells = max((*seen, *failed), default=0.0)
    both = max((taken + missed for taken, missed in zip(seen, failed, strict=True)), default=0.0)
    return noise_std > 0 and (cells >= SIGNIFICANT * noise_std or both >= SIGNIFICANT * math.sqrt(2) * noise_std)


def aggregate(plan: pb.RoundPlan, reports: Iterable[Sequence[int]]) -> round_pb2.Aggregate:
    """Adds up the noisy vectors of a round.

    All batches of a round carry the same noise, so that each counts the same.

    Args:
        plan: the round's plan.
        reports: `noisy` of each batch that was kept.
    """
    layout = layout_of(plan)
    sums, batches = [0] * layout.length, 0
    for report in reports:
        batches += 1
        sums = [total + value for total, value in zip(sums, report, strict=True)]
    noise_std = math.sqrt(batches * variance_of(plan.mechanism))
    seen = [float(value) for value in layout.seen(sums)]
    failed = [float(value) for value in layout.failed(sums)]
    estimates = zip(plan.bins, seen, failed, weights(seen, failed), strict=True)
    return round_pb2.Aggregate(
        bins=[
            round_pb2.BinEstimate(bin_id=bin_.bin_id, seen=taken, failed=missed, weight=share)
            for bin_, taken, missed, share in estimates
        ],
        noise_std=noise_std,
        informative=is_informative(seen, failed, noise_std),
        metrics=[float(value) for value in layout.metric_cells(sums)],
    )


def mixture(result: round_pb2.Aggregate) -> dict[str, float]:
    """Returns the share of each topic that a closed round suggests for the next distillation."""
    return {estimate.bin_id: estimate.weight for estimate in result.bins}
