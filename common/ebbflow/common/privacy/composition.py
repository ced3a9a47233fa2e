"""Whether rounds of some costs, in whatever mixture, stay within an epsilon at a delta.

A charge of rho stands for one of two things, and the account need not know which:

- a lone vote under discrete Gaussian noise of variance 1 / 2·rho. Canonne, Kamath and Steinke (2020), theorem 7, give
  its loss exactly;
- something that tells no more than Gaussian noise of that rho. Discrete noise of variance s² on a list of whole numbers
  tells no more than Gaussian noise of variance 1/l with l - l²/12 = 1/s², which is about s² - 1/12: for every list,
  whatever its caps and however one user's change is spread (proof: docs/reference/privacy-mechanisms.md).

A lone vote is one of the second kind too, at a cost that is slightly higher. So rounds of several costs are bounded as
one Gaussian release, or by the conversion of zCDP, and both hold however late a round is chosen. Rounds of one cost are
bounded by any number of lone votes exactly, and all the others as one Gaussian release.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from ebbflow.common.privacy import accounting
from ebbflow.common.privacy.accounting import NANO
from ebbflow.common.privacy.gaussian import probabilities

_TWELFTH = Fraction(1, 12)
"""Variance of what rounding to whole numbers takes away."""
_SMOOTH_FROM = 4.0  # variance from which a sum of discrete Gaussians is one, to 1e-16
_FINE_FROM = 10_000.0  # variance of a sum of votes from which its lattice is too fine to matter
_MOST_BLOCKS = 64
_CUT = 30.0  # what is left out of a distribution weighs less than delta·exp(-25)


def covers(cost_nano: int, variance: Fraction, sensitivity_squared: int) -> bool:
    """Whether a cost may stand for discrete noise of a variance on what one user changes by more than one vote.

    A list is held to a little more noise than its bound asks for: 1/12 for each unit of sensitivity². So whoever
    chooses after each answer whether the next round asks for votes alone or for more gains nothing by it; without it,
    that would lead to an epsilon of 4.004 instead of 4.
    """
    rate = _list_rate(cost_nano, sensitivity_squared)
    return variance > 0 and rate - rate * rate / 12 >= 1 / variance


def variance_for(cost_nano: int, sensitivity_squared: int) -> Fraction:
    """Least variance on a list that a cost may stand for."""
    rate = _list_rate(cost_nano, sensitivity_squared)
    return 12 / (rate * (12 - rate))


def _list_rate(cost_nano: int, sensitivity_squared: int) -> Fraction:
    """One over the variance of the continuous noise that a list's noise is bounded by; at most 6 from 2 on."""
    return 1 / (sensitivity_squared * (Fraction(NANO, 2 * cost_nano) + _TWELFTH))


def _as_gaussian(cost_nano: int) -> float:
    """Rho of continuous noise that tells no less than anything that this cost stands for; infinite if none is known."""
    third = 2 * cost_nano / (3 * NANO)  # 1 / 3·s² of a lone vote: solves l - l²/12 = 1/s² for l
    return 3 * third / (1 + math.sqrt(1 - third)) if third <= 1 else math.inf


def within(costs_nano: Iterable[int] | Mapping[int, int], epsilon: float, delta: float) -> bool:
    """Whether rounds of these costs together stay within epsilon at delta, whatever they asked for.

    The answer is yes only if there is a bound that says so; it may be no for rounds of several costs that are within by
    less than a few parts in a hundred.

    Args:
        costs_nano: cost of each round in billionths of rho, or how many rounds there are of each cost.
        epsilon: above zero.
        delta: in (0, 1).
    """
    counted = sorted(each for each in Counter(costs_nano).items() if each[1])
    return _within(tuple(counted), epsilon, delta)


@functools.lru_cache(maxsize=1024)
def _within(counted: tuple[tuple[int, int], ...], epsilon: float, delta: float) -> bool:
    rho = sum(cost * times for cost, times in counted) / NANO
    if rho <= 0:
        return True
    if _gaussian_delta(epsilon, rho) > delta:
        return False
    total = sum(_as_gaussian(cost) * times for cost, times in counted)
    if _gaussian_delta(epsilon, total) <= delta or accounting.zcdp_epsilon(rho, delta) <= epsilon:
        return True
    return len(counted) == 1 and _all_within(*counted[0], epsilon, delta)


def _gaussian_delta(epsilon: float, rho: float) -> float:
    return accounting.gaussian_delta(epsilon, math.sqrt(2 * rho)) if math.isfinite(rho) else 1.0


def _all_within(cost: int, times: int, epsilon: float, delta: float) -> bool:
    """Whether it holds however many of the rounds of one cost are lone votes.

    Numbers of votes are looked at in blocks: the fewest votes of a block exactly, those that it may have besides as
    continuous noise.
    """
    one, loose = cost / NANO, _as_gaussian(cost)
    blocks = [(0, times - 1), (times, times)]
    for _ in range(_MOST_BLOCKS):
        if not blocks:
            return True
        fewest, most = blocks.pop()
        rho = (times - most) * one + ((most - fewest) * loose if most > fewest else 0.0)
        if _is_mixture_within(cost, fewest, rho, epsilon, delta):
            continue
        if fewest == most:
            return False
        middle = (fewest + most) // 2
        blocks += [(fewest, middle), (middle + 1, most)]
    return not blocks


def _is_mixture_within(cost: int, votes: int, rho: float, epsilon: float, delta: float) -> bool:
    variance = NANO / (2 * cost)
    exactly = min(votes, int(_FINE_FROM // variance))
    if exactly < votes:
        rho += (votes - exactly) * _as_gaussian(cost)
    if not math.isfinite(rho):
        return False
    reach = math.sqrt(2 * (_CUT - math.log(delta)))
    # The variance is at most a billionth part of rho larger than the cost says, which weighs masses by so much more.
    slack = 1 + 2 * variance * (math.sqrt(exactly) + reach) ** 2 / NANO + 1e-9
    return mixture_delta(variance, exactly, rho, epsilon, reach) * slack <= delta


def mixture_delta(variance: float, votes: int, rho: float, epsilon: float, reach: float) -> float:
    """Delta at epsilon of lone votes under discrete noise, exactly, together with a Gaussian release of `rho`.

    The sum of the votes' noise is a sufficient statistic; given it, what is left is Gaussian.

    Args:
        variance: of the noise on each vote.
        votes: how many there are.
        rho: of the Gaussian release; 0 for none.
        epsilon: at which.
        reach: how many standard deviations of the votes' noise are looked at.
    """
    if not votes:
        return _gaussian_delta(epsilon, rho) if rho else 0.0
    mu, parts = math.sqrt(2 * rho), []
    masses = _sum_masses(variance, votes, reach)
    for value, mass in enumerate(masses, start=-(len(masses) // 2)):
        left = epsilon - (2 * value + votes) / (2 * variance)
        if left < mu * (mu / 2 + reach + 1):  # what is beyond is less than what `reach` leaves out
            parts.append(mass * (accounting.gaussian_delta(left, mu) if mu else max(0.0, -math.expm1(left))))
    return math.fsum(parts)


@functools.lru_cache(maxsize=64)
def _sum_masses(variance: float, count: int, reach: float) -> tuple[float, ...]:
    """Distribution of the sum of `count` samples, centred and cut at `reach` standard deviations."""
    most = math.ceil(reach * math.sqrt(variance * count)) + 1
    if variance >= _SMOOTH_FROM or count == 1:
        return tuple(probabilities(variance * count, most))
    half = _sum_masses(variance, count // 2, reach)
    total: Sequence[float] = _convolve(half, half)
    if count % 2:
        total = _convolve(total, _sum_masses(variance, 1, reach))
    centre = len(total) // 2
    return tuple(total[max(0, centre - most) : centre + most + 1])


def _convolve(left: Sequence[float], right: Sequence[float]) -> list[float]:
    out = [0.0] * (len(left) + len(right) - 1)
    for at, weight in enumerate(left):
        if weight:
            for other_at, other in enumerate(right, start=at):
                out[other_at] += weight * other
    return out
