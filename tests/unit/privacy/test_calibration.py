"""What a policy claims holds for the discrete noise that is really added."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from list_costs import cost_nano

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import accounting, calibration
from ebbflow.common.privacy.composition import within
from ebbflow.common.privacy.gaussian import probabilities, tail

DELTA = 1e-6


def exact_epsilon(shift: Sequence[int], variance: float, rounds: int, delta: float) -> float:
    """Epsilon of one user whose contribution is `shift` in every round, from the distribution of the privacy loss.

    Only sum(shift · noise) matters; its distribution is a convolution of stretched discrete Gaussians.
    """
    total = np.ones(1)
    for part in list(shift) * rounds:
        masses = np.array(probabilities(variance, tail(Fraction(variance))))
        stretched = np.zeros((len(masses) - 1) * part + 1)
        stretched[::part] = masses
        total = np.convolve(total, stretched)
    value = np.arange(len(total)) - len(total) // 2
    norm_squared = rounds * sum(part * part for part in shift)
    loss = (2 * value + norm_squared) / (2 * variance)  # with the user against without, at noise -value

    def delta_at(epsilon: float) -> float:
        beyond = loss > epsilon
        return float((total[beyond] * -np.expm1(epsilon - loss[beyond])).sum())

    low, high = 0.0, float(loss.max())
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(
    ("epsilon", "rounds", "sigma"),
    [(1, 4, 8.45), (4, 4, 2.39), (8, 4, 1.31), (1, 1, 4.22), (2, 4, 4.46), (4, 30, 6.54), (4, 1, 1.19)],
)
def test_sigma_is_that_of_the_known_profiles(epsilon: float, rounds: int, sigma: float) -> None:
    variance = calibration.variance_of(calibration.calibrate(epsilon, DELTA, rounds))
    assert math.sqrt(variance) == pytest.approx(sigma, rel=5e-3)


@pytest.mark.parametrize("epsilon", [0.5, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_the_claim_holds_exactly_for_discrete_noise(epsilon: float, rounds: int) -> None:
    variance = float(calibration.variance_of(calibration.calibrate(epsilon, DELTA, rounds)))
    assert exact_epsilon([1], variance, rounds, DELTA) <= epsilon + 1e-9


def test_the_formula_for_continuous_noise_alone_would_break_the_claim() -> None:
    cap = accounting.rho_nano_cap(8.0, DELTA) / 1e9
    assert exact_epsilon([1], 4 / (2 * cap), 4, DELTA) > 8.04


@pytest.mark.parametrize("caps", [(1,), (2,), (1, 2), (3, 1), (5,), (1,) * 8])
@pytest.mark.parametrize(
    ("epsilon", "rounds"), [(1, 4), (4, 4), (8, 4), (16, 4), (4, 1), (5, 1), (6, 2), (3, 2), (5, 4), (64, 1)]
)
def test_the_claim_holds_for_every_way_to_use_metrics(caps: tuple[int, ...], epsilon: float, rounds: int) -> None:
    """One counter at an epsilon of 4 and one round was really 4.015, at 5 it was 5.054, at 6 and two rounds 6.011."""
    sensitivity = 1 + sum(cap * cap for cap in caps)
    variance = float(calibration.variance_of(calibration.calibrate(epsilon, DELTA, rounds, sensitivity)))
    worst = exact_epsilon([1, *caps], variance, rounds, DELTA)
    assert worst <= epsilon
    if len(caps) < 3:
        for amounts in itertools.product(*(range(cap + 1) for cap in caps)):
            shift = [1, *(amount for amount in amounts if amount)]
            assert exact_epsilon(shift, variance, rounds, DELTA) <= worst + 1e-9


@settings(deadline=None, max_examples=40)
@example(5.0, 1e-4, 1, 1)
@given(st.floats(0.2, 20), st.sampled_from([1e-4, 1e-6, 1e-9]), st.integers(1, 60), st.integers(1, 20))
def test_a_window_never_costs_more_than_it_claims(epsilon: float, delta: float, rounds: int, sensitivity: int) -> None:
    mechanism = calibration.calibrate(epsilon, delta, rounds, sensitivity)
    variance = calibration.variance_of(mechanism)
    assert cost_nano(variance, sensitivity) <= mechanism.rho_nano
    assert within({mechanism.rho_nano: rounds}, epsilon, delta)
    assert accounting.epsilon_of(mechanism.rho_nano * rounds, delta) <= epsilon
    less = cost_nano(variance * Fraction(96, 100), sensitivity)
    # Where sigma is small the lattice decides, and the continuous figure may lie well below it.
    assert less == 0 or accounting.epsilon_of(less * rounds, delta) > epsilon * 0.95 or epsilon > 8


def test_metrics_cost_noise_and_not_budget() -> None:
    plain, richer = calibration.calibrate(4, DELTA, 4), calibration.calibrate(4, DELTA, 4, 10)
    assert richer.rho_nano == plain.rho_nano
    assert 10 < calibration.variance_of(richer) / calibration.variance_of(plain) < 10.2


def test_a_policy_is_completed_with_the_defaults() -> None:
    policy = calibration.complete_policy(pb.PrivacyPolicy())
    assert (policy.epsilon, policy.delta, policy.window_days, policy.rounds_per_window) == (4.0, 1e-6, 30, 4)
    assert policy.rho_cap_nano == pytest.approx(351_000_000, rel=2e-3)
    assert calibration.complete_policy(policy) == policy


@pytest.mark.parametrize(
    ("epsilon", "delta", "rounds"), [(0.001, DELTA, 4), (100, DELTA, 4), (4, 0.1, 4), (4, DELTA, 0)]
)
def test_a_target_out_of_range_is_refused(epsilon: float, delta: float, rounds: int) -> None:
    with pytest.raises(EbbflowError) as caught:
        calibration.calibrate(epsilon, delta, rounds)
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_more_noise_than_the_sampler_makes_is_refused() -> None:
    with pytest.raises(EbbflowError, match="more noise"):
        calibration.calibrate(0.05, DELTA, 1000)
