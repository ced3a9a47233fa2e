"""Runs a release many times with and without one user, and tells what the runs prove."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.audit import claims
from ebbflow.common.privacy.audit.bounds import (
    ALPHA,
    Runs,
    influence_lower_bound,
    mu_lower_bound,
    scale_fails,
)
from ebbflow.common.privacy.audit.sampling import (
    Samples,
    fit_p_value,
    repeated_p_value,
    serial_p_value,
    shared_p_value,
)
from ebbflow.common.privacy.audit.subjects import Release, Subject, release
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.vector import add_contributions, layout_of

MIN_RUNS = 1000
"""Below it the bounds prove nothing."""
DEFAULT_RUNS = 50_000
"""Runs of each world, at which half of the noise is missed less than once in a hundred audits."""
_CHUNK = 500
_MOSTLY_ZERO = Fraction(1, 4)
"""Variance below which too few samples are not zero for their spread to have a chi-square law: they are counted."""

Progress = Callable[[int], None]
"""Told how many more runs are done."""


@dataclass(frozen=True)
class Finding:
    """What one test said.

    Attributes:
        mechanism: what was tested.
        test: which test, and along what.
        runs: runs of each world that went into it.
        measured: what was found: a variance relative to the claimed one, a lower bound on a user's influence or on mu,
            or a p-value.
        relation: what `measured` must be to `claimed`: "about", "at most" or "at least".
        claimed: what it is held against: 1, the sensitivity, the mu of the policy, or the probability of a false alarm.
        failed: whether it proves a leak.
    """

    mechanism: str
    test: str
    runs: int
    measured: float
    relation: str
    claimed: float
    failed: bool


@dataclass(frozen=True)
class Observed:
    """Reports of one world.

    Attributes:
        along: what they say along the subject's directions; shape [runs, directions].
        noise: the reports less what the users really added; shape [runs, cells].
    """

    along: Runs
    noise: Samples


def observe(
    subject: Subject, with_canary: bool, runs: int, build: Release = release, progress: Progress = lambda done: None
) -> Observed:
    """Releases one world so many times.

    Args:
        subject: the mechanism.
        with_canary: whether the user takes part.
        runs: how often.
        build: the release code.
        progress: told every few hundred runs.
    """
    users = (*subject.others, subject.canary) if with_canary else subject.others
    exact: Samples = np.array(add_contributions(subject.plan, users))
    weights = subject.weights()
    along, noise = [], []
    for begin in range(0, runs, _CHUNK):
        count = min(_CHUNK, runs - begin)
        reports = np.array([build(subject.plan, users) for _ in range(count)], np.int64)
        along.append(reports[:, : weights.shape[1]].astype(np.float64) @ weights.T)
        noise.append(reports - exact)
        progress(count)
    return Observed(np.concatenate(along), np.concatenate(noise))


def _scale(subject: Subject, direction: str, noise: Runs) -> Finding:
    parameter = variance_of(subject.plan.mechanism)
    variance, kurtosis = claims.noise_moments(parameter)
    if parameter < _MOSTLY_ZERO:
        failed = not claims.binomial_holds(int((noise != 0).sum()), len(noise), claims.not_zero(parameter))
    else:
        failed = scale_fails(noise, variance, kurtosis=kurtosis)
    ratio = float(noise.var(ddof=1)) / variance
    return Finding(subject.name, f"scale, {direction}", len(noise), ratio, "about", 1.0, failed)


def _influence(subject: Subject, direction: str, without: Runs, with_: Runs) -> Finding:
    variance, _ = claims.noise_moments(variance_of(subject.plan.mechanism))
    bound = influence_lower_bound(without, with_, variance)
    claimed = math.sqrt(subject.plan.mechanism.sensitivity_squared)
    return Finding(subject.name, f"influence, {direction}", len(with_), bound, "at most", claimed, bound > claimed)


def _by_window(runs: Runs, rounds: int) -> Runs:
    """Sums of so many rounds each, scaled so that their noise is that of one."""
    whole = len(runs) // rounds * rounds
    sums: Runs = runs[:whole].reshape(-1, rounds).sum(axis=1) / math.sqrt(rounds)
    return sums


def _mu(subject: Subject, direction: str, without: Runs, with_: Runs) -> list[Finding]:
    rounds = subject.plan.policy.rounds_per_window
    tests = [("a round", without, with_, claims.round_mu(subject.plan))]
    if rounds > 1:
        windows = (_by_window(without, rounds), _by_window(with_, rounds))
        tests.append(("a window", *windows, claims.window_mu(subject.plan)))
    found = []
    for span, one, other, claimed in tests:
        bound = mu_lower_bound(one, other)
        test, failed = f"mu of {span}, {direction}", bound > claimed
        found.append(Finding(subject.name, test, len(one), bound, "at most", claimed, failed))
    return found


def examine(
    subject: Subject, runs: int = DEFAULT_RUNS, build: Release = release, progress: Progress = lambda done: None
) -> list[Finding]:
    """Audits one mechanism; each finding that failed is a leak, but for a false alarm once in a million tests.

    Args:
        subject: the mechanism and its policy.
        runs: runs of each of the two worlds; at least MIN_RUNS.
        build: the release code.
        progress: told every few hundred runs; there are twice `runs`.
    """
    if runs < MIN_RUNS:
        raise ValueError(f"an audit of fewer than {MIN_RUNS} runs proves nothing")
    without, with_ = (observe(subject, there, runs, build, progress) for there in (False, True))
    first, *_ = subject.directions
    weights = subject.weights()
    findings = [_scale(subject, first, without.noise[:, : weights.shape[1]] @ weights[0])]
    for at, direction in enumerate(subject.directions):
        worlds = without.along[:, at], with_.along[:, at]
        findings += [_influence(subject, direction, *worlds), *_mu(subject, direction, *worlds)]
    return findings + _noise(subject, without.noise)


def _noise(subject: Subject, noise: Samples) -> list[Finding]:
    variance = variance_of(subject.plan.mechanism)
    null = noise[:, layout_of(subject.plan).length - subject.plan.null_bins]
    tests = {
        "a null bin fits the noise": fit_p_value(null, variance),
        "a null bin tells nothing of its next": serial_p_value(null),
        "every cell has noise of its own": shared_p_value(noise, variance),
        "no noise comes twice": repeated_p_value(noise, variance),
    }
    return [_p_value(subject.name, test, len(noise), p_value) for test, p_value in tests.items()]


def _p_value(mechanism: str, test: str, runs: int, p_value: float) -> Finding:
    return Finding(mechanism, test, runs, p_value, "at least", ALPHA, p_value < ALPHA)


def examine_sampler(plan: pb.RoundPlan, samples: int) -> list[Finding]:
    """Holds the sampler itself against the exact distribution, and one draw against the next."""
    variance = variance_of(plan.mechanism)
    drawn = np.array(DiscreteGaussian(variance).sample(samples))
    tests = {
        "fits the exact distribution": fit_p_value(drawn, variance),
        "one sample tells nothing of the next": serial_p_value(drawn),
    }
    return [_p_value("sampler", test, samples, p_value) for test, p_value in tests.items()]
