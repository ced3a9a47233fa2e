"""What a release costs and what a cost means: integer nano-rho in, epsilon at a delta out.

The unit of account is the rho of zero-concentrated differential privacy (Bun and Steinke, 2016) in whole billionths,
rounded up: charges add exactly, whatever the order and however later rounds depend on earlier ones. The unit of privacy
is one user on one agent; adjacency is adding or removing that user.
"""

import functools
import math
from collections.abc import Callable
from fractions import Fraction

NANO = 10**9
WINDOWS_PER_YEAR = 12
_HALVINGS = 200


def rho_nano(variance: Fraction, sensitivity_squared: int) -> int:
    """Cost of one Gaussian release, continuous or discrete: sensitivity² / 2·variance, in billionths, rounded up."""
    return math.ceil(NANO * Fraction(sensitivity_squared) / (2 * variance))


def _log_tail(x: float) -> float:
    """Natural logarithm of the standard normal's mass above x."""
    if x < 37.0:  # noqa: PLR2004 - beyond it erfc leaves the range of a float
        return math.log(math.erfc(x / math.sqrt(2)) / 2)
    return -x * x / 2 - math.log(x * math.sqrt(2 * math.pi))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Smallest delta of a Gaussian mechanism whose sensitivity over sigma is `mu` (Balle and Wang, 2018, theorem 8)."""
    above = math.exp(_log_tail(epsilon / mu - mu / 2))
    return max(0.0, above - math.exp(epsilon + _log_tail(epsilon / mu + mu / 2)))


def gaussian_epsilon(rho: float, delta: float) -> float:
    """Epsilon of Gaussian releases whose rho adds up to `rho`, exact for continuous noise, rounded up.

    Args:
        rho: total cost in units of rho, not nano-rho.
        delta: in (0, 1).
    """
    if rho <= 0:
        return 0.0
    mu = math.sqrt(2 * rho)
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    enough = rho + mu * math.sqrt(2 * math.log(1 / delta)) + 1
    return smallest_epsilon(lambda epsilon: gaussian_delta(epsilon, mu), delta, enough)


def smallest_epsilon(delta_at: Callable[[float], float], delta: float, enough: float) -> float:
    """Smallest epsilon whose delta is no larger than `delta`, rounded up.

    Args:
        delta_at: delta by epsilon, which falls.
        delta: what is allowed.
        enough: an epsilon that is large enough.
    """
    low, high = 0.0, enough
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if delta_at(middle) > delta:
            low = middle
        else:
            high = middle
    return high


def epsilon_of(spent_nano: int, delta: float) -> float:
    """Epsilon of what an account has spent, at its delta."""
    return gaussian_epsilon(spent_nano / NANO, delta)


def epsilon_left(spent_nano: int, cap_nano: int, delta: float) -> float:
    """What epsilon may still grow by in the window: epsilon of the cap less epsilon of what was spent."""
    return max(0.0, epsilon_of(cap_nano, delta) - epsilon_of(spent_nano, delta))


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Epsilon of any mechanism of that rho, the bound to quote where mechanisms are mixed.

    Canonne, Kamath and Steinke (2020), corollary 13, minimised over the order alpha.
    """
    if rho <= 0:
        return 0.0

    def bound(log_order: float) -> float:
        excess = math.exp(log_order)  # alpha - 1
        order = 1 + excess
        return rho * order + (math.log(1 / delta) - math.log(order)) / excess + math.log(excess / order)

    low, high = math.log(1e-6), math.log(1e6)
    for _ in range(_HALVINGS):
        third = (high - low) / 3
        if bound(low + third) < bound(high - third):
            high -= third
        else:
            low += third
    return max(0.0, bound(high))


@functools.lru_cache(maxsize=256)
def rho_nano_cap(epsilon: float, delta: float) -> int:
    """Most whole billionths of rho whose `epsilon_of` stays within epsilon at delta.

    No more may be spent, but not all of it may be: `composition.within` says what discrete noise allows.
    """
    low, high = 0, math.ceil(NANO * (epsilon + 1))
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon_of(middle, delta) <= epsilon:
            low = middle
        else:
            high = middle
    return low


def renewed_epsilon(cap_nano: int, delta: float, windows: int = WINDOWS_PER_YEAR) -> float:
    """Epsilon of a user who is present in that many windows, each spent to its cap; at the same delta overall."""
    return epsilon_of(cap_nano * windows, delta)
