"""When a sum tells more than noise."""

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
