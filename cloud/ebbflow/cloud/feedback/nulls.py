"""What null bins tell about a batch's noise. They hold noise only, so too little of it shows there."""

from collections.abc import Sequence
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


def lower_tail(nulls: Sequence[int], variance: Fraction) -> float:
    """Probability that correct noise is as small as this: exact where sigma is small, chi-square where it is large."""
    square_sum, sigma_squared = sum(value * value for value in nulls), float(variance)
    from scipy.special import gammainc  # 17 MB that a control plane without feedback need not hold

    approximate = float(gammainc(len(nulls) / 2, square_sum / sigma_squared / 2))  # the chi-square law
    if approximate > _SUSPICIOUS or variance >= _CONTINUOUS_FROM:
        return approximate
    return _exact_lower_tail(square_sum, len(nulls), sigma_squared)


def is_under_noised(nulls: Sequence[int], variance: Fraction) -> bool:
    """Whether null bins are smaller than correct noise is but once in a million batches."""
    return lower_tail(nulls, variance) < FALSE_ALARM


def is_reused(nulls: Sequence[int], earlier: Sequence[int], variance: Fraction) -> bool:
    """Whether two batches of one agent were made from the same noise, be it scaled or negated."""
    if variance < _CORRELATION_FROM or len(nulls) != len(earlier):
        return False
    left, right = np.asarray(nulls, np.float64), np.asarray(earlier, np.float64)
    length = float(np.linalg.norm(left) * np.linalg.norm(right))
    return length > 0 and abs(float(left @ right)) / length > _CORRELATED
