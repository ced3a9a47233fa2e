"""Batches with too little noise, or with noise that was used before, show in their null bins."""

from fractions import Fraction

import pytest
from scipy.stats import chi2

from ebbflow.cloud.feedback import nulls
from ebbflow.cloud.feedback.nulls import Tally, is_reused, is_too_small, is_under_noised, lower_tail
from ebbflow.common.privacy.gaussian import DiscreteGaussian

DEFAULT = Fraction(23360, 4096)


@pytest.mark.parametrize("variance", [DEFAULT, Fraction(286, 4), Fraction(7, 4), Fraction(1, 4), Fraction(1, 40)])
def test_correct_noise_passes(variance: Fraction) -> None:
    sampler = DiscreteGaussian(variance)
    assert sum(is_under_noised(sampler.sample(64), variance) for _ in range(300)) <= 1  # one in a million does not


@pytest.mark.parametrize("variance", [DEFAULT, Fraction(286, 4), Fraction(400)])
def test_half_of_sigma_is_caught_in_most_single_batches(variance: Fraction) -> None:
    sampler = DiscreteGaussian(variance / 4)
    caught = sum(is_under_noised(sampler.sample(64), variance) for _ in range(300))
    assert caught > 280


@pytest.mark.parametrize("variance", [DEFAULT, Fraction(286, 4), Fraction(7, 4)])
def test_no_noise_at_all_is_always_caught(variance: Fraction) -> None:
    assert is_under_noised([0] * 64, variance)


def test_the_exact_tail_meets_the_chi_square_law_where_sigma_is_large() -> None:
    for square_sum in (1300, 1500, 1800):
        exact = nulls._exact_lower_tail(square_sum, 64, 63.9)
        assert exact == pytest.approx(chi2.cdf(square_sum / 63.9, 64), rel=0.1)


def test_the_exact_tail_is_a_probability() -> None:
    assert lower_tail(Tally(64, 0), Fraction(1, 40)) == pytest.approx(1.0, abs=1e-6)
    assert lower_tail(Tally(1, 0), Fraction(1)) == pytest.approx(0.3989, abs=1e-3)  # P[0] of the discrete Gaussian


def test_noise_that_was_used_before_is_recognised_also_scaled_or_negated() -> None:
    earlier = DiscreteGaussian(DEFAULT).sample(64)
    for again in (earlier, [-value for value in earlier], [2 * value for value in earlier]):
        assert is_reused(again, earlier, DEFAULT)


def test_fresh_noise_is_not_taken_for_old() -> None:
    sampler = DiscreteGaussian(DEFAULT)
    assert not any(is_reused(sampler.sample(64), sampler.sample(64), DEFAULT) for _ in range(500))
    assert not is_reused([0] * 64, [0] * 64, DEFAULT)
    assert not is_reused([1] * 64, [1] * 65, DEFAULT)


def pooled(variance: Fraction, plan_variance: Fraction, batches: int, runs: int) -> int:
    """In how many runs the batches that passed alone are found together."""
    sampler, found = DiscreteGaussian(variance), 0
    for _ in range(runs):
        tally = Tally()
        for _ in range(batches):
            cells = sampler.sample(64)
            if not is_under_noised(cells, plan_variance):
                tally.add(cells)
        found += is_too_small(tally, plan_variance)
    return found


@pytest.mark.parametrize("plan_variance", [DEFAULT, Fraction(286, 4), Fraction(7, 4)])
def test_fifteen_batches_together_show_a_sixth_less_noise(plan_variance: Fraction) -> None:
    assert pooled(plan_variance / Fraction(144, 100), plan_variance, 15, 100) >= 97


@pytest.mark.parametrize("plan_variance", [DEFAULT, Fraction(286, 4), Fraction(7, 4), Fraction(1, 4), Fraction(1, 40)])
def test_correct_noise_passes_together_too(plan_variance: Fraction) -> None:
    assert pooled(plan_variance, plan_variance, 15, 100) <= 1  # likewise


def test_one_batch_alone_does_not_show_a_sixth_less_noise() -> None:
    sampler = DiscreteGaussian(DEFAULT / Fraction(144, 100))
    assert sum(is_under_noised(sampler.sample(64), DEFAULT) for _ in range(300)) < 30
