"""Losses from logits: as precise as float64, whatever the shape."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.edge.engine.loss import _BLOCK_NUMBERS, token_losses


@given(
    tokens=st.integers(0, 40),
    vocabulary=st.sampled_from([2, 300, _BLOCK_NUMBERS // 7, _BLOCK_NUMBERS + 1]),
    spread=st.sampled_from([0.01, 1.0, 40.0]),
    shift=st.sampled_from([-1e4, 0.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_losses_are_those_of_float64(tokens: int, vocabulary: int, spread: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = min(tokens, max(1, 2 * _BLOCK_NUMBERS // vocabulary))
    logits_TV = (rng.normal(0, spread, (tokens, vocabulary)) + shift).astype(np.float32)
    targets_T = rng.integers(0, vocabulary, tokens)
    wide_TV = logits_TV.astype(np.float64)
    wide_TV -= wide_TV.max(axis=1, initial=-np.inf, keepdims=True)
    expected_T = np.log(np.exp(wide_TV).sum(axis=1)) - wide_TV[np.arange(tokens), targets_T]
    np.testing.assert_allclose(token_losses(logits_TV, targets_T), expected_T, rtol=1e-5, atol=2e-6)


def test_a_loss_that_is_no_number_stays_none() -> None:
    logits_TV = np.array([[0.0, np.nan], [0.0, 0.0]], np.float32)
    losses_T = token_losses(logits_TV, np.array([0, 1]))
    assert np.isnan(losses_T[0])
    assert abs(losses_T[1] - np.log(2)) < 1e-6
