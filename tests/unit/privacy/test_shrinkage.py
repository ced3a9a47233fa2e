"""Best guesses at true counts behind noisy ones."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.privacy.shrinkage import shrink
from ebbflow.common.privacy.weights import weights

COUNTS = st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), min_size=1, max_size=30)


@given(COUNTS, st.floats(0, 1e6))
def test_guesses_are_finite_and_never_negative(counts: list[tuple[float, float]], noise_std: float) -> None:
    seen, failed = zip(*counts, strict=True)
    guesses = shrink(seen, failed, noise_std)
    assert [len(part) for part in guesses] == [len(counts)] * 2
    assert all(math.isfinite(guess) and guess >= 0 for part in guesses for guess in part)


@given(st.permutations(range(6)))
def test_the_order_of_the_bins_does_not_matter(order: list[int]) -> None:
    seen, failed = [900.0, 30.0, -80.0, 200.0, 5.0, 0.0], [100.0, -20.0, 60.0, 90.0, -5.0, 40.0]
    plain = shrink(seen, failed, 50.0)
    turned = shrink([seen[i] for i in order], [failed[i] for i in order], 50.0)
    for part, other in zip(plain, turned, strict=True):
        assert other == pytest.approx([part[i] for i in order])


def test_without_noise_many_votes_are_taken_as_they_are() -> None:
    seen, failed = shrink([9000.0, 500.0, 40.0], [1000.0, 0.0, 10.0], 0.0)
    assert seen == pytest.approx([9000, 500, 40], rel=0.05)
    assert failed == pytest.approx([1000, 0, 10], rel=0.05, abs=3)


def test_what_is_nothing_but_noise_gives_nearly_equal_weights() -> None:
    rng = np.random.default_rng(0)
    spreads = []
    for _ in range(20):
        seen, failed = 100 * rng.standard_normal((2, 50))
        found = weights(seen.tolist(), failed.tolist(), 100.0)
        spreads.append(sum(abs(share - 1 / 50) for share in found))
    assert np.mean(spreads) < 0.35, "cut at zero they are 1.05 apart"


def test_what_stands_out_of_the_noise_keeps_its_weight() -> None:
    rng = np.random.default_rng(1)
    true = np.array([5000.0, 2000.0, *[50.0] * 48])
    seen, failed = true + 100 * rng.standard_normal((2, 50)) - np.stack([0 * true, true])
    guessed, missed = shrink(seen.tolist(), failed.tolist(), 100.0)
    assert guessed[:2] == pytest.approx([5000, 2000], rel=0.1)
    assert sum(missed) < 500, "cut at zero, fifty counts of noise alone add up to 1,375"


@pytest.mark.parametrize("epsilon_noise", [75.0, 270.0])
def test_guesses_are_nearer_to_the_truth_than_counts_cut_at_zero(epsilon_noise: float) -> None:
    rng = np.random.default_rng(2)
    demand = 1 / np.arange(1, 151)
    true = 20_000 * demand / demand.sum()
    ours, cut = [], []
    for _ in range(20):
        seen = 0.75 * true + epsilon_noise * rng.standard_normal(150)
        failed = 0.25 * true + epsilon_noise * rng.standard_normal(150)
        wanted = np.array(weights((0.75 * true).tolist(), (0.25 * true).tolist()))
        ours.append(np.abs(np.array(weights(seen.tolist(), failed.tolist(), epsilon_noise)) - wanted).sum())
        cut.append(np.abs(np.array(weights(seen.tolist(), failed.tolist())) - wanted).sum())
    assert np.mean(ours) < 0.65 * np.mean(cut)
