"""What DP-SGD costs: the least noise within a claimed epsilon, by privacy loss distributions.

Two accountants that bound the true epsilon from above stand side by side: dp-accounting's privacy loss distributions
(what is claimed) and Opacus' PRV accountant (Gopi et al., arXiv 2106.02848). Opacus' "gdp" is an approximation that
understates, and is never asked; Renyi accounting is safe but would buy more noise for nothing.
"""

import functools
import math
import warnings
from dataclasses import dataclass

from ebbflow.cloud.distillation.private_recipe import PrivateRecipe
from ebbflow.common.errors import EbbflowError, Reason

MOST_DISAGREEMENT = 0.1
"""Share of epsilon by which the accountants may differ; more means that one of them is wrong."""

_FINE = 1e-4  # step of the grid on which losses are laid; coarser ones are faster and claim more
_DIGITS = 4  # of the noise multiplier, rounded up
_LEAST_NOISE, _MOST_NOISE = 0.2, 1e4  # below the one, the accountants' grids grow without end
_TOLERANCE = 2e-3
_GOOD_ENOUGH = 0.99  # share of epsilon that is used; a finer search would take seconds and gain less
_PRV_ERROR = 0.01  # of epsilon, which the PRV accountant adds to its figure


@dataclass(frozen=True)
class Account:
    """What one run costs each text."""

    noise_multiplier: float
    """Standard deviation of the noise on a step's sum over the clipping norm."""
    pld_epsilon: float
    """At the recipe's delta: what is claimed."""
    prv_epsilon: float
    """The same by Opacus."""

    def to_json(self) -> dict[str, float]:
        """Proto JSON of the output-only fields of a `PrivateTraining`."""
        return {
            "noiseMultiplier": self.noise_multiplier,
            "pldEpsilon": self.pld_epsilon,
            "prvEpsilon": self.prv_epsilon,
        }


@functools.lru_cache(maxsize=64)
def calibrate(recipe: PrivateRecipe) -> Account:
    """Returns the least noise, rounded up to four digits, with which the whole run stays within its epsilon.

    It follows from the recipe alone, so a run that is resumed elsewhere adds the same noise. Takes seconds.

    Raises:
        EbbflowError: INVALID_REQUEST if no noise is enough, or the two accountants disagree.
    """
    found = _least_noise(recipe, 1e-2, 0.0, _MOST_NOISE)
    found = _least_noise(recipe, 1e-3, found / 4, found)
    if pld_epsilon(recipe, found) < _GOOD_ENOUGH * recipe.epsilon:
        found = _least_noise(recipe, _FINE, found / 1.2, found)
    multiplier = _round_up(found)
    pld, prv = pld_epsilon(recipe, multiplier), prv_epsilon(recipe, multiplier)
    if pld > recipe.epsilon or abs(prv - pld) > MOST_DISAGREEMENT * pld + _PRV_ERROR:
        message = f"the accountants put epsilon at {pld:.3f} and {prv:.3f}: choose other steps or another batch_size"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="private_training.epsilon")
    return Account(multiplier, pld, prv)


def pld_epsilon(recipe: PrivateRecipe, noise_multiplier: float, interval: float = _FINE) -> float:
    """Returns the epsilon of the whole run at its delta: an upper bound, whatever the interval.

    Args:
        recipe: rate, steps and delta.
        noise_multiplier: standard deviation of the noise over the clipping norm.
        interval: step of the grid; a coarser one is faster and bounds less tightly.
    """
    import dp_accounting
    from dp_accounting import pld

    step = dp_accounting.PoissonSampledDpEvent(recipe.sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    accountant = pld.PLDAccountant(value_discretization_interval=interval)
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, recipe.steps))
    return float(accountant.get_epsilon(recipe.delta))


def prv_epsilon(recipe: PrivateRecipe, noise_multiplier: float) -> float:
    """Returns the same by Opacus, an upper bound too."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, recipe.sampling_rate, recipe.steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in the far tails, which it cuts off
        return float(accountant.get_epsilon(recipe.delta, eps_error=_PRV_ERROR))


def _least_noise(recipe: PrivateRecipe, interval: float, low: float, high: float) -> float:
    """Halves [low, high] around the least multiplier within epsilon down to a 500th; returns the upper end."""
    if pld_epsilon(recipe, high, interval) > recipe.epsilon:
        message = (
            f"no noise keeps {recipe.steps} steps within epsilon {recipe.epsilon:g}: take fewer or a larger epsilon"
        )
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="private_training.epsilon")
    while high - low > _TOLERANCE * high:
        middle = math.sqrt(low * high) if low else high / 4
        if middle < _LEAST_NOISE or pld_epsilon(recipe, middle, interval) > recipe.epsilon:
            low = max(middle, _LEAST_NOISE)
        else:
            high = middle
    return high


def _round_up(value: float) -> float:
    scale = 10.0 ** (_DIGITS - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale
