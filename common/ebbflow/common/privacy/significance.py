"""When a sum tells more than noise."""

import math
from collections.abc import Sequence
from statistics import NormalDist

SIGNIFICANT = 3.0
"""Standard deviations from which one sum tells more than noise; noise alone comes so far once in 740 times."""


def deviations(sums: int) -> float:
    """Standard deviations from which the largest of several sums tells more than noise.

    So many that noise alone lifts any of them so high no more often than it lifts a single one by three (Bonferroni).
    Without it a round of 150 topics, whose 450 sums are looked at, would stand out of pure noise every other time.

    Args:
        sums: how many are looked at, at least 1.
    """
    single = NormalDist().cdf(-SIGNIFICANT)
    return -NormalDist().inv_cdf(single / sums)


def is_informative(seen: Sequence[float], failed: Sequence[float], noise_std: float) -> bool:
    """Whether a cell, or both cells of a bin together, stand so high that noise would hardly lift any there.

    In a round of noise alone that is so once in 740 rounds, however many bins there are.

    Args:
        seen: noisy votes by bin whose answer was taken or not judged.
        failed: noisy votes by bin whose answer failed.
        noise_std: standard deviation of the noise on each of them.
    """
    least = deviations(3 * len(seen)) * noise_std
    cells = max((*seen, *failed), default=0.0)
    both = max((taken + missed for taken, missed in zip(seen, failed, strict=True)), default=0.0)
    return noise_std > 0 and (cells >= least or both >= math.sqrt(2) * least)
