"""Sampling keeps what it promises to keep, and the same seed gives the same answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.sampling import Sampler, Sampling

LOGITS = hnp.arrays(np.float32, st.integers(1, 400), elements=st.floats(-30, 30, width=32))
SEEDS = st.integers(0, 2**32)


@given(LOGITS, SEEDS)
def test_temperature_zero_and_top_k_one_pick_the_likeliest(logits_V: np.ndarray, seed: int) -> None:
    best = int(np.argmax(logits_V))
    assert Sampler(Sampling(temperature=0, seed=seed)).pick(logits_V) == best
    assert Sampler(Sampling(top_k=1, seed=seed)).pick(logits_V) == best


@given(LOGITS, SEEDS, st.integers(1, 20))
def test_top_k_never_leaves_the_k_likeliest(logits_V: np.ndarray, seed: int, top_k: int) -> None:
    sampler = Sampler(Sampling(top_k=top_k, seed=seed))
    least = np.sort(logits_V)[::-1][min(top_k, len(logits_V)) - 1]
    assert all(logits_V[sampler.pick(logits_V)] >= least for _ in range(5))


@given(LOGITS, SEEDS, st.floats(0.01, 0.99), st.floats(0.2, 2.0))
def test_top_p_never_leaves_the_smallest_set_that_reaches_it(
    logits_V: np.ndarray, seed: int, top_p: float, temperature: float
) -> None:
    sampler = Sampler(Sampling(top_p=top_p, temperature=temperature, seed=seed))
    wide_V = logits_V.astype(np.float64) / temperature
    weights_V = np.exp(wide_V - wide_V.max())
    falling_V = np.sort(weights_V / weights_V.sum())[::-1]
    count = int(np.searchsorted(np.cumsum(falling_V), top_p - 1e-9)) + 2
    least = np.sort(weights_V)[::-1][: count + 1].min()
    assert all(weights_V[sampler.pick(logits_V)] >= least for _ in range(5))


@given(LOGITS, st.integers(-(2**63), 2**64), st.floats(0.1, 2.0))
def test_the_same_seed_gives_the_same_tokens(logits_V: np.ndarray, seed: int, temperature: float) -> None:
    one, other = (Sampler(Sampling(seed=seed, temperature=temperature)) for _ in range(2))
    assert [one.pick(logits_V) for _ in range(8)] == [other.pick(logits_V) for _ in range(8)]


def test_frequencies_follow_the_softmax() -> None:
    logits_V = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    sampler = Sampler(Sampling(temperature=1.5, seed=7))
    counts = np.bincount([sampler.pick(logits_V) for _ in range(20_000)], minlength=4) / 20_000
    expected = np.exp(logits_V / 1.5) / np.exp(logits_V / 1.5).sum()
    assert np.abs(counts - expected).max() < 0.015


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(EbbflowError) as caught:
        Sampler(Sampling()).pick(np.array([0.0, bad], np.float32))
    assert caught.value.reason is Reason.INTERNAL
