"""From votes to the share of each topic in the next mixture."""

import math
from collections.abc import Sequence

from ebbflow.common.privacy.shrinkage import shrink

FAILED_BOOST = 2.0
"""A vote that failed weighs this many votes that did not: the next student should learn what this one cannot."""
FLOOR_SHARE = 0.1
"""Share of the mixture that is spread evenly, so that no topic is forgotten over one round."""


def weights(
    seen: Sequence[float],
    failed: Sequence[float],
    noise_std: float = 0.0,
    *,
    failed_boost: float = FAILED_BOOST,
    floor_share: float = FLOOR_SHARE,
) -> list[float]:
    """Returns the share of each bin in the next mixture; they sum to 1.

    In proportion to seen + failed_boost · failed, where that is above zero, with `floor_share` of the whole spread
    evenly. Where nothing is above zero, every bin has the same share. Noisy votes are first replaced by the best
    guesses at the true ones (`shrinkage.shrink`), so that a round that is mostly noise says almost the same of all.

    Args:
        seen: estimated votes by bin whose answer was taken or not judged; may be negative.
        failed: estimated votes by bin whose answer failed; may be negative.
        noise_std: standard deviation of the noise on each of them; 0 takes them as they are.
        failed_boost: weight of a failed vote.
        floor_share: between 0 and 1.
    """
    if noise_std > 0:
        seen, failed = shrink(seen, failed, noise_std)
    wanted = [max(0.0, taken + failed_boost * missed) for taken, missed in zip(seen, failed, strict=True)]
    whole, count = math.fsum(wanted), len(wanted)
    if whole <= 0:
        return [1 / count] * count
    return [floor_share / count + (1 - floor_share) * want / whole for want in wanted]
