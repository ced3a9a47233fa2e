"""What charges of an account mean, by three laws beside each other.

- The generic conversion of zCDP holds for every mechanism of that rho, and is the largest.
- The law of continuous Gaussian noise is exact for continuous noise; the noise here is discrete.
- The privacy loss distribution is that of the discrete noise which was really added, composed release by release and
  rounded up to a grid (Koskela, Jälkö and Honkela, 2020; Google's dp-accounting, which rounds pessimistically).

Quoted is the larger of the last two. Lone votes under discrete noise of small variance lose up to one part in a hundred
more than continuous noise, so the continuous law alone would promise too much; lists with counters and adapter updates
are charged so that the continuous law bounds them (`composition`).

Needs dp-accounting, of the extra `cloud`.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import accounting

_STEPS = 8000
"""Steps of the grid for each mu of one release: the figure is then at most 3 parts in 100,000 too large."""
_COARSER_FROM = 64
"""Releases from which the grid grows with their number, so that the arrays stay within tens of megabytes."""


@dataclass(frozen=True)
class Epsilons:
    """Epsilon of the same charges at the same delta, by three laws.

    Attributes:
        zcdp: by the generic conversion of zCDP, which holds for any mechanism.
        gaussian: by the law of continuous Gaussian noise.
        loss_distribution: by the privacy loss distribution of discrete Gaussian noise, rounded up.
    """

    zcdp: float
    gaussian: float
    loss_distribution: float

    @property
    def quoted(self) -> float:
        """The figure to tell people: the larger of the two that fit the mechanism."""
        return max(self.gaussian, self.loss_distribution)


def epsilons(charges_nano: Iterable[int], delta: float) -> Epsilons:
    """Returns what releases of these costs mean together.

    A cost says what the noise was: one vote under discrete Gaussian noise of variance 10^9 / 2·cost, or what tells no
    more than continuous noise of that rho. Costs are rounded up, so the figure is of no more noise than there was. The
    first call for some charges takes a fraction of a second.

    Args:
        charges_nano: cost of each release in billionths of rho, in any order; one entry for each release.
        delta: in (0, 1).

    Raises:
        EbbflowError: EXTRA_MISSING without dp-accounting.
        ValueError: a cost is not above zero, or delta not in (0, 1).
    """
    counted = Counter(charges_nano)
    if not 0 < delta < 1 or any(cost <= 0 for cost in counted):
        raise ValueError("a charge must be above zero, and delta in (0, 1)")
    return _epsilons(tuple(sorted(counted.items())), delta)


@functools.lru_cache(maxsize=1024)
def _epsilons(counted: tuple[tuple[int, int], ...], delta: float) -> Epsilons:
    rho = sum(cost * times for cost, times in counted) / accounting.NANO
    return Epsilons(
        zcdp=accounting.zcdp_epsilon(rho, delta),
        gaussian=accounting.gaussian_epsilon(rho, delta),
        loss_distribution=_composed(counted, delta),
    )


def _composed(counted: tuple[tuple[int, int], ...], delta: float) -> float:
    if not counted:
        return 0.0
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError:
        message = "dp-accounting is not installed: pip install 'ebbflow[cloud]'"
        raise EbbflowError(Reason.EXTRA_MISSING, message) from None

    releases = sum(times for _, times in counted)
    dearest = counted[-1][0]
    step = math.sqrt(2 * dearest / accounting.NANO) / _STEPS * max(1.0, releases / _COARSER_FROM)
    composed: list[Any] = []
    for cost, times in counted:
        sigma = math.sqrt(accounting.NANO / (2 * cost))
        one = pld.from_discrete_gaussian_mechanism(sigma, value_discretization_interval=step, sensitivity=1)
        composed.append(one.self_compose(times) if times > 1 else one)
    total = functools.reduce(lambda one, other: one.compose(other), composed)
    return max(0.0, float(total.get_epsilon_for_delta(delta)))
