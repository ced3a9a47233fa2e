"""What null bins tell about a batch's noise. They hold noise only, so too little of it shows there."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ebbflow.common.privacy.checks import FALSE_ALARM
from ebbflow.common.privacy.gaussian import probabilities, tail

_CONTINUOUS_FROM = 64  # variance from which the chi-square law is within a few per cent of the exact tail
_SUSPICIOUS = 0.01
_CORRELATED = 0.75  # independent noise of 64 bins exceeds this once in 10^9
_CORRELATION_FROM = Fraction(1, 2)  # below, most null bins are zero and correlation says nothing


def _exact_lower_tail(square_sum: int, count: int, variance: float) -> float:
    """P[sum of `count` squared discrete Gaussians <= square_sum], by convolution below that sum."""
    one = np.zeros(square_sum + 1)
    reach = min(tail(Fraction(variance)), int(np.sqrt(square_sum)))
    whole = tail(Fraction(variance))
    masses = probabilities(variance, whole)
    for value in range(-reach, reach + 1):
        one[value * value] += masses[value + whole]
    total = np.zeros(square_sum + 1)
    total[0] = 1.0
    while count:
        if count & 1:
            total = _truncated(total, one)
        one = _truncated(one, one)
        count >>= 1
    return float(total.sum())


def _truncated(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    length = len(left) + len(right) - 1
    product: npt.NDArray[np.float64] = np.fft.irfft(np.fft.rfft(left, length) * np.fft.rfft(right, length), length)
    return np.maximum(product[: len(left)], 0.0)


@dataclass
class Tally:
    """Null bins of one batch or of several, summed up."""

    count: int = 0
    square_sum: int = 0

    def add(self, nulls: Sequence[int]) -> None:
        """Counts null bins in."""
        self.count += len(nulls)
        self.square_sum += sum(value * value for value in nulls)


def lower_tail(tally: Tally, variance: Fraction) -> float:
    """Probability that correct noise is as small as this: exact where sigma is small, chi-square where it is large."""
    from scipy.special import gammainc  # 17 MB that a control plane without feedback need not hold

    sigma_squared = float(variance)
    approximate = float(gammainc(tally.count / 2, tally.square_sum / sigma_squared / 2))  # the chi-square law
    if approximate > _SUSPICIOUS or variance >= _CONTINUOUS_FROM:
        return approximate
    return _exact_lower_tail(tally.square_sum, tally.count, sigma_squared)


def is_too_small(tally: Tally, variance: Fraction) -> bool:
    """Whether null bins are smaller than correct noise is but once in a million times."""
    return lower_tail(tally, variance) < FALSE_ALARM


def is_under_noised(nulls: Sequence[int], variance: Fraction) -> bool:
    """Whether the null bins of one batch are smaller than correct noise is but once in a million batches."""
    tally = Tally()
    tally.add(nulls)
    return is_too_small(tally, variance)


def is_reused(nulls: Sequence[int], earlier: Sequence[int], variance: Fraction) -> bool:
    """Whether two batches of one agent were made from the same noise, be it scaled or negated."""
    if variance < _CORRELATION_FROM or len(nulls) != len(earlier):
        return False
    left, right = np.asarray(nulls, np.float64), np.asarray(earlier, np.float64)
    length = float(np.linalg.norm(left) * np.linalg.norm(right))
    return length > 0 and abs(float(left @ right)) / length > _CORRELATED
