"""Epsilon and rho agree with published numbers and with Google's dp-accounting."""

import math
from fractions import Fraction

import dp_accounting
import pytest
from dp_accounting import rdp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from ebbflow.common.privacy import accounting

DELTA = 1e-6


@pytest.mark.parametrize(
    ("epsilon", "rho", "generic", "yearly"),
    [
        (0.5, 0.0077, 0.54, 1.9),
        (1, 0.0280, 1.08, 3.9),
        (2, 0.1005, 2.15, 8.1),
        (4, 0.351, 4.28, 17.4),
        (8, 1.173, 8.52, 38.6),
    ],
)
def test_known_figures(epsilon: float, rho: float, generic: float, yearly: float) -> None:
    cap = accounting.rho_nano_cap(epsilon, DELTA)
    assert cap / 1e9 == pytest.approx(rho, abs=6e-5 if epsilon < 4 else 6e-4)
    assert accounting.zcdp_epsilon(cap / 1e9, DELTA) == pytest.approx(generic, abs=6e-3)
    assert accounting.renewed_epsilon(cap, DELTA) == pytest.approx(yearly, abs=0.05)


@pytest.mark.parametrize(("sigma", "rounds"), [(8.0, 30), (2.387, 4), (1.1935, 1), (23.14, 30), (0.8, 2)])
def test_gaussian_epsilon_is_that_of_dp_accounting(sigma: float, rounds: int) -> None:
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(sigma), rounds)
    expected = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-4).compose(event).get_epsilon(DELTA)
    ours = accounting.gaussian_epsilon(rounds / (2 * sigma**2), DELTA)
    assert ours == pytest.approx(expected, rel=2e-4)
    assert ours <= expected  # theirs is rounded up to its grid


def test_zcdp_epsilon_is_no_worse_than_renyi_accounting() -> None:
    for rho in (0.001, 0.03, 0.35, 3.0):
        expected = rdp.RdpAccountant().compose(dp_accounting.ZCDpEvent(rho=rho)).get_epsilon(DELTA)
        assert 0.95 * expected <= accounting.zcdp_epsilon(rho, DELTA) <= expected  # theirs tries fewer orders


@given(st.floats(0.01, 60), st.floats(0.05, 8))
def test_gaussian_delta_is_the_textbook_formula(epsilon: float, mu: float) -> None:
    expected = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    assert accounting.gaussian_delta(epsilon, mu) == pytest.approx(expected, rel=1e-6, abs=1e-14)


@given(st.floats(0.1, 40), st.sampled_from([1e-3, 1e-6, 1e-10]))
def test_the_cap_is_the_most_that_stays_within_epsilon(epsilon: float, delta: float) -> None:
    cap = accounting.rho_nano_cap(epsilon, delta)
    assert accounting.epsilon_of(cap, delta) <= epsilon < accounting.epsilon_of(cap + 1, delta) + 1e-12


@given(st.integers(1, 10**12), st.integers(1, 10**6), st.integers(1, 10**4))
def test_cost_is_rounded_up(numerator: int, denominator: int, sensitivity_squared: int) -> None:
    exact = Fraction(sensitivity_squared * 10**9 * denominator, 2 * numerator)
    assert 0 <= accounting.rho_nano(Fraction(numerator, denominator), sensitivity_squared) - exact < 1


@given(st.integers(0, 10**10), st.integers(0, 10**10))
def test_spending_more_never_costs_less_epsilon(first: int, second: int) -> None:
    low, high = sorted((first, second))
    assert accounting.epsilon_of(low, DELTA) <= accounting.epsilon_of(high, DELTA)
    assert accounting.zcdp_epsilon(low / 1e9, DELTA) <= accounting.zcdp_epsilon(high / 1e9, DELTA) + 1e-9


def test_nothing_spent_is_epsilon_zero() -> None:
    assert accounting.epsilon_of(0, DELTA) == 0 == accounting.zcdp_epsilon(0, DELTA)
    assert accounting.epsilon_left(0, 350_000_000, DELTA) == accounting.epsilon_of(350_000_000, DELTA)
    assert accounting.epsilon_left(350_000_000, 350_000_000, DELTA) == 0


def test_huge_costs_do_not_overflow() -> None:
    assert accounting.gaussian_epsilon(5000.0, DELTA) == pytest.approx(5000 + math.sqrt(2 * 5000) * 4.75, rel=0.01)
