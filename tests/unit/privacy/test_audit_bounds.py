"""The two tests prove no more than there is, and nearly as much."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.common.privacy.audit.bounds import influence_lower_bound, mu_lower_bound, scale_fails


@pytest.mark.parametrize("mu", [0.1185, 0.84, 3.0])
def test_the_bound_exceeds_the_truth_no_oftener_than_alpha(mu: float) -> None:
    random = np.random.default_rng(1)
    audits = [
        mu_lower_bound(random.normal(0, 1, 2000), random.normal(mu, 1, 2000), alpha=0.05) > mu for _ in range(150)
    ]
    assert sum(audits) <= 20  # 7.5 are expected at most; 21 or more would come once in 30,000 of such tests


def test_the_bound_is_close_to_the_truth_at_full_size() -> None:
    random = np.random.default_rng(2)
    bound = mu_lower_bound(random.normal(0, 1, 50_000), random.normal(0.84, 1, 50_000))
    assert 0.7 < bound <= 0.84


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_difference_in_any_direction_is_found(sign: int, swapped: bool) -> None:
    random = np.random.default_rng(3)
    worlds = [random.normal(0, 1, 5000), random.normal(2.0 * sign, 1, 5000)]
    without, with_ = worlds[::-1] if swapped else worlds
    assert mu_lower_bound(without, with_) > 1.3


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_noise_that_grows_or_shrinks_with_the_user_is_found(scale: float) -> None:
    """What a size that leaks does: the means agree, and the tails tell."""
    random = np.random.default_rng(4)
    assert mu_lower_bound(random.normal(0, 1, 5000), random.normal(0, scale, 5000)) > 0.5


@given(st.integers(2, 200), st.integers(2, 200), st.integers(0, 2**32 - 1), st.booleans())
@settings(deadline=None)
def test_any_two_worlds_give_a_bound(left: int, right: int, seed: int, constant: bool) -> None:
    random = np.random.default_rng(seed)
    without, with_ = (
        np.zeros(count) if constant else random.integers(-2, 3, count).astype(float) for count in (left, right)
    )
    assert 0.0 <= mu_lower_bound(without, with_) < 10.0


def test_a_wrong_scale_is_found_and_a_right_one_passes() -> None:
    random = np.random.default_rng(5)
    runs = random.normal(0, 2, 5000)
    assert not scale_fails(runs, 4.0)
    assert scale_fails(runs / 1.2, 4.0)
    assert scale_fails(runs * 1.2, 4.0)


def test_the_scale_test_knows_noise_that_is_mostly_zero() -> None:
    """At a variance of 0.03 hardly anything but zeros is drawn: a Gaussian's law would call that scatter a bug."""
    random = np.random.default_rng(6)
    odds = 0.015
    kurtosis = 1 / (2 * odds)
    draws = random.choice([-1.0, 0.0, 1.0], (200, 3000), p=[odds, 1 - 2 * odds, odds])
    assert sum(scale_fails(runs, 2 * odds, 0.01, kurtosis) for runs in draws) <= 10
    assert sum(scale_fails(runs, 2 * odds, 0.01) for runs in draws) > 50


@pytest.mark.parametrize("sign", [1, -1])
def test_a_user_who_moves_the_mean_too_far_is_found_and_one_who_does_not_is_not(sign: int) -> None:
    random = np.random.default_rng(7)
    without = random.normal(0, 8.45, 50_000)
    moved = {shift: without + sign * shift + random.normal(0, 1e-6, 50_000) for shift in (1.0, 1.414)}
    fresh = {shift: random.normal(sign * shift, 8.45, 50_000) for shift in moved}
    assert influence_lower_bound(without, fresh[1.0], 8.45**2) <= 1
    assert influence_lower_bound(without, fresh[1.414], 8.45**2) > 1
    assert influence_lower_bound(without, moved[1.414], 8.45**2) < 1.414


def test_the_influence_of_nobody_is_found_no_oftener_than_alpha() -> None:
    random = np.random.default_rng(8)
    found = [
        influence_lower_bound(random.normal(0, 2, 1000), random.normal(1, 2, 1000), 4.0, alpha=0.1) > 1
        for _ in range(400)
    ]
    assert 5 <= sum(found) <= 45  # of 20 that are expected: one side of two
