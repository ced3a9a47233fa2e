"""The sampler draws what it says it draws."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from ebbflow.common.privacy import gaussian
from ebbflow.common.privacy.gaussian import DiscreteGaussian, probabilities, tail


@pytest.mark.parametrize("variance", [Fraction(7, 4), Fraction(23357, 4096), Fraction(286, 4), Fraction(536)])
def test_samples_fit_the_exact_distribution(variance: Fraction) -> None:
    count = 60_000
    samples = np.array(DiscreteGaussian(variance).sample(count))
    values = np.arange(-tail(variance), tail(variance) + 1)
    expected = np.array(probabilities(float(variance), tail(variance))) * count
    common = expected > 10
    observed = np.array([(samples == value).sum() for value in values[common]])
    rest = count - observed.sum()
    observed, expected = np.append(observed, rest), np.append(expected[common], expected[~common].sum())
    assert chisquare(observed, expected * count / expected.sum()).pvalue > 1e-6


@pytest.mark.parametrize("variance", [Fraction(1, 16), Fraction(23357, 4096), Fraction(1000)])
def test_the_table_is_the_exact_distribution_to_39_digits(variance: Fraction) -> None:
    context = mpmath.MPContext()
    context.prec = 320
    sigma_squared = context.mpf(variance.numerator) / variance.denominator
    reach = tail(variance)
    weights = [context.exp(-context.mpf(k * k) / (2 * sigma_squared)) for k in range(-reach, reach + 1)]
    whole = sum(weights)
    below, expected = context.mpf(0), []
    for weight in weights[:-1]:
        below += weight
        expected.append(int(context.floor(below / whole * context.mpf(2) ** 128)))
    assert list(gaussian._table(variance)) == expected


def test_extreme_random_bytes_give_the_ends_of_the_range() -> None:
    sampler = DiscreteGaussian(Fraction(4))
    assert sampler.invert(b"\xff" * 16) == [sampler.tail]
    assert sampler.invert(b"\x00" * 16)[0] <= -13 * 2
    assert sampler.invert((2**127).to_bytes(16, "little")) == [0]


@given(st.fractions(min_value=Fraction(1, 100), max_value=400, max_denominator=4096), st.integers(0, 50))
def test_any_variance_stays_within_the_tail(variance: Fraction, count: int) -> None:
    samples = DiscreteGaussian(variance).sample(count)
    assert len(samples) == count
    assert all(abs(value) <= tail(variance) for value in samples)


def test_two_draws_differ() -> None:
    sampler = DiscreteGaussian(Fraction(6))
    assert sampler.sample(100) != sampler.sample(100)


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(-1), Fraction(gaussian.MAX_VARIANCE + 1)])
def test_a_variance_out_of_range_is_refused(variance: Fraction) -> None:
    with pytest.raises(ValueError, match="variance"):
        DiscreteGaussian(variance)
