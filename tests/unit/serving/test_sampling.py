"""Sampling keeps what it promises to keep, and the same seed gives the same answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.penalties import Penalties
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


@given(LOGITS, SEEDS, st.floats(0.01, 1.0), st.floats(0.2, 2.0))
def test_min_p_keeps_what_is_not_much_less_likely_than_the_likeliest(
    logits_V: np.ndarray, seed: int, min_p: float, temperature: float
) -> None:
    sampler = Sampler(Sampling(min_p=min_p, seed=seed, temperature=temperature))
    least = logits_V.max() + temperature * np.log(min_p) - 1e-3
    assert all(logits_V[sampler.pick(logits_V)] >= least for _ in range(5))


@given(LOGITS, SEEDS, st.integers(1, 30), st.floats(0.05, 0.95), st.floats(0.0, 0.9))
def test_filters_together_keep_what_each_keeps(
    logits_V: np.ndarray, seed: int, top_k: int, top_p: float, min_p: float
) -> None:
    """Top-p counts the shares of what top-k has left."""
    picked = Sampler(Sampling(top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)).pick(logits_V)
    falling = np.sort(np.exp(logits_V.astype(np.float64) - logits_V.max()))[::-1][:top_k]
    before = np.concatenate([[0.0], np.cumsum(falling)[:-1]])
    kept = falling[(before < top_p * falling.sum() + 1e-6) & (falling >= min_p - 1e-6)]
    assert np.exp(float(logits_V[picked]) - float(logits_V.max())) >= kept.min() - 1e-6


@given(LOGITS, SEEDS, st.data())
def test_penalties_are_what_they_are_defined_to_be(logits_V: np.ndarray, seed: int, data: st.DataObject) -> None:
    tokens = st.lists(st.integers(0, len(logits_V) - 1), max_size=90)
    prompt, answer = data.draw(tokens), data.draw(tokens)
    repetition, presence, frequency = data.draw(st.tuples(st.floats(0.5, 3), st.floats(-2, 2), st.floats(-2, 2)))
    bias = data.draw(st.dictionaries(st.integers(0, len(logits_V) - 1), st.floats(-100, 100), max_size=5))
    penalties = Penalties(repetition, presence, frequency, list(bias.items()), prompt)
    for token in answer:
        penalties.add(token)
    expected_V = logits_V.astype(np.float64)
    for token in set(prompt) | set(answer):
        expected_V[token] *= 1 / repetition if expected_V[token] > 0 else repetition
    for token in set(answer):
        expected_V[token] -= presence + frequency * answer.count(token)
    for token, value in bias.items():
        expected_V[token] += value
    before_V = logits_V.copy()
    np.testing.assert_allclose(penalties.apply(logits_V), expected_V, atol=2e-3)
    np.testing.assert_array_equal(logits_V, before_V, "the engine's own are left alone")


def test_frequencies_follow_the_softmax_over_many_blocks_of_the_vocabulary() -> None:
    """Every tenth of a large vocabulary comes as often as its probability says, with and without a nucleus."""
    logits_V = np.random.default_rng(3).normal(0, 2, 3000).astype(np.float32)
    weights_V = np.exp(logits_V.astype(np.float64))
    for top_p in (1.0, 0.8):
        sampler = Sampler(Sampling(seed=1, top_p=top_p))
        falling = np.argsort(-weights_V, kind="stable")
        kept = falling[: int(np.searchsorted(np.cumsum(weights_V[falling]), top_p * weights_V.sum())) + 1]
        expected_V = np.zeros(3000)
        expected_V[kept] = weights_V[kept] / weights_V[kept].sum()
        counts = np.bincount([sampler.pick(logits_V) for _ in range(20_000)], minlength=3000) / 20_000
        assert np.abs(counts.reshape(10, -1).sum(1) - expected_V.reshape(10, -1).sum(1)).max() < 0.015
        assert counts[expected_V == 0].sum() <= 1e-3


def test_the_smallest_temperature_is_greedy() -> None:
    logits_V = np.array([1.0, 3.0, 2.9], np.float32)
    assert {Sampler(Sampling(temperature=5e-324, seed=seed)).pick(logits_V) for seed in range(20)} == {1}


def test_the_choices_of_one_request_have_seeds_of_their_own() -> None:
    assert [Sampling(seed=5).choice(place).seed for place in range(3)] == [5, 6, 7]
    assert Sampling().choice(2).seed is None
