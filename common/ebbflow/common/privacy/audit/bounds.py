"""What many runs of a release prove about it: the three tests of the audit that look at users.

Two worlds, with and without one user, many runs of each; whatever tells them apart better than the claim allows is a
bug in noise, bound or composition. A pass means that no leak was found along this user at this number of runs, not that
there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ALPHA = 1e-6
"""Probability of a false alarm, for each test."""
_THRESHOLDS = 200

Runs = npt.NDArray[np.float64]
"""One statistic, one value for each run of one world."""
_Counts = npt.NDArray[np.int64]


def scale_fails(runs: Runs, variance: float, alpha: float = ALPHA, kurtosis: float = 3.0) -> bool:
    """Whether the spread of a statistic is not that of its noise: two-sided chi-square test.

    Noise that is not Gaussian has a variance that scatters more or less; its kurtosis sets the degrees of freedom
    (Satterthwaite's approximation, exact for Gaussian noise).

    Args:
        runs: the statistic, one value for each run of one world.
        variance: variance that the noise should have.
        alpha: probability of a false alarm.
        kurtosis: fourth central moment of the noise over its squared variance.
    """
    from scipy.stats import chi2

    freedom = 2 * (len(runs) - 1) / (kurtosis - 1)
    ratio = float(runs.var(ddof=1)) * freedom / variance
    return not chi2.ppf(alpha / 2, freedom) <= ratio <= chi2.ppf(1 - alpha / 2, freedom)


def influence_lower_bound(without: Runs, with_: Runs, variance: float, alpha: float = ALPHA) -> float:
    """How far one user moves the mean of a statistic at least, in either direction.

    Far sharper than a bound on mu where too much of a user is counted, because it takes the noise for granted, which
    other tests look at; blind to all but the mean. By the normal law of means of thousands of runs.

    Args:
        without: the statistic in runs without the user.
        with_: the same with the user.
        variance: variance that the noise should have; where it scatters more, the scatter counts.
        alpha: probability of a false alarm.
    """
    from scipy.stats import norm

    spread = sum(max(variance, float(world.var(ddof=1))) / len(world) for world in (without, with_))
    shift = abs(float(with_.mean()) - float(without.mean()))
    return max(0.0, shift - float(norm.isf(alpha / 2)) * float(np.sqrt(spread)))


def _bound(hits: _Counts, hit_runs: int, misses: _Counts, miss_runs: int, alpha: float) -> Runs:
    """Lower bound on mu from true and false positives (Clopper and Pearson, each side at alpha/2)."""
    from scipy.stats import beta, norm

    with np.errstate(invalid="ignore", divide="ignore"):
        low = np.where(hits == 0, 0.0, beta.ppf(alpha / 2, hits, hit_runs - hits + 1))
        high = np.where(misses == miss_runs, 1.0, beta.ppf(1 - alpha / 2, misses + 1, miss_runs - misses))
        bound: Runs = np.nan_to_num(norm.ppf(low) - norm.ppf(high), nan=-np.inf)
    return bound


@dataclass(frozen=True)
class _Rule:
    """Guess "with" (or "without") where the statistic is at or above (or below) a threshold."""

    guess_with: bool
    above: bool

    def counts(self, without: Runs, with_: Runs, thresholds: Runs) -> tuple[_Counts, int, _Counts, int]:
        """Returns hits, runs of the guessed world, false alarms, runs of the other."""
        guessed, other = (with_, without) if self.guess_with else (without, with_)
        return self._at(guessed, thresholds), len(guessed), self._at(other, thresholds), len(other)

    def _at(self, runs: Runs, thresholds: Runs) -> _Counts:
        below = np.searchsorted(np.sort(runs), thresholds).astype(np.int64)
        return len(runs) - below if self.above else below


_RULES = [_Rule(guess_with, above) for guess_with in (True, False) for above in (True, False)]


def mu_lower_bound(without: Sequence[float] | Runs, with_: Sequence[float] | Runs, alpha: float = ALPHA) -> float:
    """Largest mu of Gaussian differential privacy that the runs prove, with confidence 1 - alpha.

    Half of the runs choose a threshold, the other half tests it. Claim: sensitivity over sigma, times the square root
    of the number of releases; FAIL if the bound is larger. Nasr et al., "Tight Auditing of Differentially Private
    Machine Learning" (2023).

    Args:
        without: the statistic in runs without the user.
        with_: the same with the user.
        alpha: probability of a false alarm.
    """
    runs = [np.asarray(world, np.float64) for world in (without, with_)]
    choose, test = ([world[part::2] for world in runs] for part in (0, 1))
    grid = np.unique(np.quantile(np.concatenate(choose), np.linspace(0.0005, 0.9995, _THRESHOLDS)))
    found = []
    for rule in _RULES:
        bounds = _bound(*rule.counts(choose[0], choose[1], grid), alpha)
        at = int(bounds.argmax())
        found.append((float(bounds[at]), grid[at : at + 1], rule))
    _, threshold, rule = max(found, key=lambda item: item[0])
    return max(0.0, float(_bound(*rule.counts(test[0], test[1], threshold), alpha)[0]))
