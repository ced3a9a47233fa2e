"""What a release claims, in the terms that the audit measures: mu, variance and kurtosis of discrete noise."""

import functools
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.accounting import NANO
from ebbflow.common.privacy.audit.bounds import ALPHA
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.gaussian import probabilities, tail

_LEAST_MASS = 1e-13
"""Tails below this are beyond what floats tell apart, and far below what any number of runs can prove."""


def _masses(variance: Fraction) -> npt.NDArray[np.float64]:
    return np.array(probabilities(float(variance), tail(variance)))


@functools.lru_cache(maxsize=64)
def discrete_mu(variance: Fraction, rounds: int = 1) -> float:
    """Least mu whose Gaussian trade-off bounds a vote under discrete noise, at every threshold.

    Discrete noise of small variance gives away more than continuous noise: 1.740 instead of 1.538 at a variance of
    0.42. So the continuous figure would let the audit fail a correct build.

    Args:
        variance: of the noise on the vote's cell, in units of a vote.
        rounds: releases whose sum is looked at.
    """
    from scipy.stats import norm

    total = one = _masses(variance)
    for _ in range(rounds - 1):
        total = np.convolve(total, one)
    above = np.cumsum(total[::-1])[::-1]  # above[i] is the mass at or beyond point i
    hits, misses = above[:-rounds], above[rounds:]  # a user in every round moves the sum by `rounds`
    told = (misses > _LEAST_MASS) & (hits < 1 - _LEAST_MASS)
    return float((norm.isf(misses[told]) - norm.isf(hits[told])).max())


def _mu(plan: pb.RoundPlan, share: int, rounds: int) -> float:
    """Of so many rounds that may cost the cap's `share`-th part: only a lone vote's lattice makes it more."""
    continuous = math.sqrt(2 * plan.policy.rho_cap_nano / share / NANO)
    if plan.mechanism.sensitivity_squared != 1:
        return continuous
    return max(continuous, discrete_mu(variance_of(plan.mechanism), rounds))


def round_mu(plan: pb.RoundPlan) -> float:
    """What one round may give away about one user by its policy: the window's share of a round."""
    return _mu(plan, plan.policy.rounds_per_window, 1)


def window_mu(plan: pb.RoundPlan) -> float:
    """What all rounds of a window may give away about one user together, by its policy."""
    return _mu(plan, 1, plan.policy.rounds_per_window)


@functools.lru_cache(maxsize=64)
def noise_moments(variance: Fraction) -> tuple[float, float]:
    """Returns the exact variance and the kurtosis of one sample; below a parameter of one they are not sigma² and 3."""
    masses = _masses(variance)
    squares = (np.arange(len(masses)) - len(masses) // 2) ** 2.0
    second, fourth = float(masses @ squares), float(masses @ squares**2)
    return second, fourth / second**2


def not_zero(variance: Fraction) -> float:
    """Probability that a sample is not zero."""
    masses = _masses(variance)
    return float(1 - masses[len(masses) // 2])


def binomial_holds(count: int, runs: int, odds: float) -> bool:
    """Whether so many of the runs is within what these odds give, but for a false alarm once in a million."""
    from scipy.stats import binom

    return bool(binom.ppf(ALPHA / 2, runs, odds) <= count <= binom.isf(ALPHA / 2, runs, odds))
