"""From a claimed epsilon to a variance, such that the claim holds for the discrete noise that is really added.

The formula for continuous noise understates discrete noise slightly where sigma is small: one would promise epsilon 8
over four rounds and give 8.05. So what is proved of the discrete noise decides (`composition`), and the variance is
raised until a window of any rounds of the policy is within the claim.
"""

import functools
import math
from fractions import Fraction

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import accounting
from ebbflow.common.privacy.composition import variance_for, within
from ebbflow.common.privacy.gaussian import MAX_VARIANCE

GRID = 4096
"""Variances are multiples of 1/GRID, so that they travel as an exact fraction."""

MAX_ROUNDS = 1000
MIN_EPSILON = 0.05
MAX_EPSILON = 64.0
MAX_DELTA = 1e-3
MIN_DELTA = 1e-15

DEFAULT_EPSILON = 4.0
DEFAULT_DELTA = 1e-6
DEFAULT_WINDOW_DAYS = 30
DEFAULT_ROUNDS_PER_WINDOW = 4
DEFAULT_RETENTION_DAYS = 90


@functools.lru_cache(maxsize=256)
def _unit_variance(epsilon: float, delta: float, rounds: int) -> Fraction:
    round_nano = accounting.rho_nano_cap(epsilon, delta) // rounds  # so that rounding up never exceeds the cap
    steps = math.ceil(Fraction(GRID * accounting.NANO, 2 * round_nano))
    while not within({accounting.rho_nano(Fraction(steps, GRID), 1): rounds}, epsilon, delta):
        steps += max(1, steps // 4000)
    return Fraction(steps, GRID)


def check_target(epsilon: float, delta: float, rounds_per_window: int) -> None:
    """Refuses what no mechanism here can promise.

    Raises:
        EbbflowError: INVALID_REQUEST that names the field.
    """
    limits = (
        ("epsilon", MIN_EPSILON <= epsilon <= MAX_EPSILON, f"between {MIN_EPSILON:g} and {MAX_EPSILON:g}"),
        ("delta", MIN_DELTA <= delta <= MAX_DELTA, f"between {MIN_DELTA:g} and {MAX_DELTA:g}"),
        ("rounds_per_window", 1 <= rounds_per_window <= MAX_ROUNDS, f"between 1 and {MAX_ROUNDS}"),
    )
    for field, holds, words in limits:
        if not holds:
            raise EbbflowError(Reason.INVALID_REQUEST, f"{field} must be {words}", field=f"privacy_policy.{field}")


def calibrate(epsilon: float, delta: float, rounds_per_window: int, sensitivity_squared: int = 1) -> pb.Mechanism:
    """Returns the mechanism with the least noise such that a whole window stays within epsilon at delta.

    Every round of a policy costs the same. For a list that one user changes by more than one vote
    (`sensitivity_squared` above one) the variance is that of a vote and a twelfth, times `sensitivity_squared`, and
    another twelfth: `composition.variance_for`.

    Raises:
        EbbflowError: INVALID_REQUEST if the target is out of range.
    """
    check_target(epsilon, delta, rounds_per_window)
    variance = _unit_variance(epsilon, delta, rounds_per_window)
    cost = accounting.rho_nano(variance, 1)
    if sensitivity_squared != 1:
        variance = Fraction(math.ceil(GRID * variance_for(cost, sensitivity_squared)), GRID)
    if variance > MAX_VARIANCE:
        message = f"so small an epsilon over {rounds_per_window} rounds needs more noise than the sampler makes"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="privacy_policy.epsilon")
    return pb.Mechanism(
        kind=pb.Mechanism.KIND_DISCRETE_GAUSSIAN,
        sigma_squared_numerator=variance.numerator,
        sigma_squared_denominator=variance.denominator,
        sensitivity_squared=sensitivity_squared,
        rho_nano=cost,
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
