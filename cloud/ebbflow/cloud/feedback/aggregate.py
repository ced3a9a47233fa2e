"""What a round says: sums of privatised batches and the mixture they suggest. It is post-processing, and free."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback import limits
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.significance import is_informative
from ebbflow.common.privacy.vector import layout_of, metric_caps
from ebbflow.common.privacy.weights import weights

_CHUNK = 1000  # batches that are in memory as floats


def aggregate(plan: pb.RoundPlan, reports: Iterable[Sequence[int]]) -> round_pb2.Aggregate:
    """Adds up the noisy vectors of a round, each within the limits of one agent's influence.

    All batches of a round carry the same noise, so that each counts the same.

    Args:
        plan: the round's plan, of votes.
        reports: `noisy` of each batch that was kept.
    """
    layout, caps_M = layout_of(plan), np.array(metric_caps(plan), np.float64)
    cells, width = 2 * layout.bins, 2 * layout.bins + layout.metrics
    rows = [np.asarray(report[:width], np.int32) for report in reports]
    totals, largest = [int(row[:cells].sum()) for row in rows], [int(row[:cells].max()) for row in rows]
    found = limits.find(totals, largest, cells, math.sqrt(variance_of(plan.mechanism)))
    sums, limited = np.zeros(width), 0
    for begin in range(0, len(rows), _CHUNK):
        chunk_AC = np.stack(rows[begin : begin + _CHUNK]).astype(np.float64)
        if found is not None:
            limited += found.apply(chunk_AC[:, :cells], chunk_AC[:, cells:], caps_M)
        sums += chunk_AC.sum(axis=0)
    result = estimate(plan, sums[:cells].tolist(), sums[cells:].tolist(), len(rows))
    result.limited_batches = limited
    return result


def estimate(plan: pb.RoundPlan, votes: Sequence[float], metrics: Sequence[float], batches: int) -> round_pb2.Aggregate:
    """Says what sums of noisy vectors mean.

    Args:
        plan: the round's plan.
        votes: sums of votes seen by bin, then of votes failed.
        metrics: sums of the metrics.
        batches: how many vectors were added up.
    """
    noise_std = math.sqrt(batches * variance_of(plan.mechanism))
    seen, failed = votes[: len(plan.bins)], votes[len(plan.bins) :]
    result = _weighed([bin_.bin_id for bin_ in plan.bins], seen, failed, noise_std)
    result.metrics.extend(metrics)
    result.batches = batches
    return result


def pool(results: Sequence[round_pb2.Aggregate]) -> round_pb2.Aggregate:
    """Adds up what rounds that asked the same say of its bins.

    A round whose batches carry more noise than those of the quietest, because it had counters or a smaller epsilon,
    counts for less: by the inverse of the variance of a batch, which tells most where agents ask alike in every round.

    Args:
        results: at least one, of rounds of votes with the same bins.

    Returns:
        Bins in votes of the quietest rounds, noise_std, informative and batches; the metrics stay with their rounds.
    """
    heard = [result for result in results if result.batches] or results[-1:]
    variances = [result.noise_std**2 / max(1, result.batches) for result in heard]
    shares = [min(variances) / variance if variance else 1.0 for variance in variances]
    bins = list(zip(*(result.bins for result in heard), strict=True))
    pooled = _weighed(
        [each[0].bin_id for each in bins],
        [_weighted_sum(shares, [estimate.seen for estimate in each]) for each in bins],
        [_weighted_sum(shares, [estimate.failed for estimate in each]) for each in bins],
        math.hypot(*(share * result.noise_std for share, result in zip(shares, heard, strict=True))),
    )
    pooled.batches = sum(result.batches for result in heard)
    return pooled


def _weighted_sum(shares: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(share * value for share, value in zip(shares, values, strict=True))


def _weighed(
    ids: Sequence[str], seen: Sequence[float], failed: Sequence[float], noise_std: float
) -> round_pb2.Aggregate:
    estimates = zip(ids, seen, failed, weights(seen, failed, noise_std), strict=True)
    return round_pb2.Aggregate(
        bins=[
            round_pb2.BinEstimate(bin_id=bin_id, seen=taken, failed=missed, weight=share)
            for bin_id, taken, missed, share in estimates
        ],
        noise_std=noise_std,
        informative=is_informative(seen, failed, noise_std),
    )
