"""From a claimed epsilon to a variance, such that the claim holds for the discrete noise that is really added.

The formula for continuous noise understates discrete noise slightly where sigma is small: one would promise epsilon 8
over four rounds and give 8.05. So the exact figure of the composed discrete mechanism decides, and the variance is
raised until it is within the claim.
"""

import functools
import itertools
import math
from fractions import Fraction

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import accounting
from ebbflow.common.privacy.gaussian import MAX_VARIANCE, probabilities

GRID = 4096
"""Variances are multiples of 1/GRID, so that they travel as an exact fraction."""

MAX_ROUNDS = 1000
MAX_DELTA = 1e-3
MIN_DELTA = 1e-15

DEFAULT_EPSILON = 4.0
DEFAULT_DELTA = 1e-6
DEFAULT_WINDOW_DAYS = 30
DEFAULT_ROUNDS_PER_WINDOW = 4
DEFAULT_RETENTION_DAYS = 90

_CONTINUOUS_FROM = 10**5  # variance of the sum from which continuous and discrete epsilon agree to 1e-6
_SMOOTH_FROM = 4  # variance from which a sum of discrete Gaussians is one, to 1e-16
_HALVINGS = 100


def _convolve(left: list[float], right: list[float]) -> list[float]:
    out = [0.0] * (len(left) + len(right) - 1)
    for at, weight in enumerate(left):
        if weight:
            for other_at, other in enumerate(right, start=at):
                out[other_at] += weight * other
    return out


def _sum_pmf(variance: float, rounds: int) -> list[float]:
    """Distribution of the sum of `rounds` samples, centred."""
    if variance >= _SMOOTH_FROM:
        return probabilities(variance * rounds, math.ceil(14 * math.sqrt(variance * rounds)) + 1)
    one = probabilities(variance, math.ceil(14 * math.sqrt(variance)) + 1)
    total = one
    for _ in range(rounds - 1):
        total = _convolve(total, one)
    return total


def discrete_epsilon(variance: Fraction, rounds: int, delta: float) -> float:
    """Epsilon at delta of a vote that moves one cell by one in each of `rounds` discrete Gaussian releases.

    Canonne, Kamath and Steinke (2020), theorem 7, for the composition: the sum of the rounds is a sufficient statistic,
    and delta(epsilon) = P[S > variance·epsilon - rounds/2] - e^epsilon · P[S > variance·epsilon + rounds/2].
    """
    if variance * rounds > _CONTINUOUS_FROM:
        return accounting.gaussian_epsilon(rounds / (2 * float(variance)), delta)
    sigma_squared = float(variance)
    masses = _sum_pmf(sigma_squared, rounds)
    centre = len(masses) // 2
    above = list(itertools.accumulate(reversed(masses)))[::-1]  # above[i] is the mass at or beyond i - centre

    def beyond(point: float) -> float:
        at = math.floor(point) + 1 + centre
        return above[max(at, 0)] if at < len(above) else 0.0

    def delta_at(epsilon: float) -> float:
        at = sigma_squared * epsilon
        far = beyond(at + rounds / 2)
        return beyond(at - rounds / 2) - (math.exp(epsilon + math.log(far)) if far else 0.0)

    low, high = 0.0, (centre + rounds) / sigma_squared
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if delta_at(middle) > delta:
            low = middle
        else:
            high = middle
    return high


@functools.lru_cache(maxsize=256)
def window_epsilon(variance: Fraction, sensitivity_squared: int, rounds: int, delta: float) -> float:
    """Epsilon of a full window: the larger of the discrete and the continuous figure.

    With metrics (sensitivity² above one) one user's change lies on a finer lattice than a lone vote's at the same
    ratio, so the figure for the vote bounds it.
    """
    unit = variance / sensitivity_squared
    continuous = accounting.gaussian_epsilon(rounds / (2 * float(unit)), delta)
    return max(continuous, discrete_epsilon(unit, rounds, delta))


@functools.lru_cache(maxsize=256)
def _unit_variance(epsilon: float, delta: float, rounds: int) -> Fraction:
    round_nano = accounting.rho_nano_cap(epsilon, delta) // rounds  # so that rounding up never exceeds the cap
    steps = math.ceil(Fraction(GRID * accounting.NANO, 2 * round_nano))
    while window_epsilon(Fraction(steps, GRID), 1, rounds, delta) > epsilon:
        steps += max(1, steps // 4000)
    return Fraction(steps, GRID)


def check_target(epsilon: float, delta: float, rounds_per_window: int) -> None:
    """Refuses what no mechanism here can promise.

    Raises:
        EbbflowError: INVALID_REQUEST that names the field.
    """
    limits = (
        ("epsilon", 0.05 <= epsilon <= 64.0, "between 0.05 and 64"),  # noqa: PLR2004 - said in words beside it
        ("delta", MIN_DELTA <= delta <= MAX_DELTA, f"between {MIN_DELTA:g} and {MAX_DELTA:g}"),
        ("rounds_per_window", 1 <= rounds_per_window <= MAX_ROUNDS, f"between 1 and {MAX_ROUNDS}"),
    )
    for field, holds, words in limits:
        if not holds:
            raise EbbflowError(Reason.INVALID_REQUEST, f"{field} must be {words}", field=f"privacy_policy.{field}")


def calibrate(epsilon: float, delta: float, rounds_per_window: int, sensitivity_squared: int = 1) -> pb.Mechanism:
    """Returns the mechanism with the least noise such that a whole window stays within epsilon at delta.

    The variance grows in proportion to `sensitivity_squared`, so that every round of a policy costs the same.

    Raises:
        EbbflowError: INVALID_REQUEST if the target is out of range.
    """
    check_target(epsilon, delta, rounds_per_window)
    variance = _unit_variance(epsilon, delta, rounds_per_window) * sensitivity_squared
    if variance > MAX_VARIANCE:
        message = f"so small an epsilon over {rounds_per_window} rounds needs more noise than the sampler makes"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="privacy_policy.epsilon")
    return pb.Mechanism(
        kind=pb.Mechanism.KIND_DISCRETE_GAUSSIAN,
        sigma_squared_numerator=variance.numerator,
        sigma_squared_denominator=variance.denominator,
        sensitivity_squared=sensitivity_squared,
        rho_nano=accounting.rho_nano(variance, sensitivity_squared),
    )


def complete_policy(policy: pb.PrivacyPolicy) -> pb.PrivacyPolicy:
    """Returns a policy with its zeros replaced by the defaults and with the cap that its epsilon allows.

    Raises:
        EbbflowError: INVALID_REQUEST if epsilon, delta or the number of rounds is out of range.
    """
    full = pb.PrivacyPolicy(
        epsilon=policy.epsilon or DEFAULT_EPSILON,
        delta=policy.delta or DEFAULT_DELTA,
        window_days=policy.window_days or DEFAULT_WINDOW_DAYS,
        rounds_per_window=policy.rounds_per_window or DEFAULT_ROUNDS_PER_WINDOW,
        lifetime_rho_cap_nano=policy.lifetime_rho_cap_nano,
        retention_days=policy.retention_days or DEFAULT_RETENTION_DAYS,
        allow_adapters=policy.allow_adapters,
    )
    mechanism = calibrate(full.epsilon, full.delta, full.rounds_per_window)
    full.rho_cap_nano = mechanism.rho_nano * full.rounds_per_window
    return full


def with_lifetime(policy: pb.PrivacyPolicy, lifetime_epsilon: float) -> pb.PrivacyPolicy:
    """Returns a complete policy whose windows together may cost `lifetime_epsilon` at its delta; 0 sets no limit.

    Raises:
        EbbflowError: INVALID_REQUEST if a figure is out of range, or the lifetime is shorter than one window.
    """
    full = complete_policy(policy)
    if not lifetime_epsilon:
        return full
    if not lifetime_epsilon >= full.epsilon:
        message = f"the lifetime's epsilon must be 0 or at least a window's, {full.epsilon:g}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="lifetime_epsilon")
    full.lifetime_rho_cap_nano = accounting.rho_nano_cap(lifetime_epsilon, full.delta)
    return full


def variance_of(mechanism: pb.Mechanism) -> Fraction:
    """The exact variance; zero where the fraction makes no sense."""
    if not mechanism.sigma_squared_denominator:
        return Fraction(0)
    return Fraction(mechanism.sigma_squared_numerator, mechanism.sigma_squared_denominator)
