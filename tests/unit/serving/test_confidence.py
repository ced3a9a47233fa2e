"""Confidence: calibrated on texts whose next tokens are known."""

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.edge.serving.confidence import Calibration, Observation, fit, observe

logs = st.floats(-50, 0)
pairs = st.lists(st.tuples(logs, st.booleans()), max_size=60)


def observation(said: list[tuple[float, bool]]) -> Observation:
    return Observation(np.array([log for log, _ in said], np.float64), np.array([hit for _, hit in said], np.bool_))


def drawn(count: int, truth: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Observation:
    """A student whose tokens are right with probability `truth` of the one that it says."""
    random = np.random.default_rng(seed)
    said = random.uniform(0.02, 0.999, count)
    return Observation(np.log(said), random.uniform(size=count) < truth(said))


@settings(deadline=None)
@given(pairs)
def test_any_observations_give_a_curve_that_rises_and_stays_a_probability(said: list[tuple[float, bool]]) -> None:
    curve = fit([observation(said)])
    assert curve.slope >= 0
    assert all(map(math.isfinite, (curve.slope, curve.offset)))
    right = curve.right(np.sort([-1e6, *(log for log, _ in said), -1e-300, 0.0]))
    assert (np.diff(right) >= 0).all()
    assert ((right >= 0) & (right <= 1)).all()


@settings(deadline=None)
@given(pairs, st.integers(0, 60))
def test_texts_may_come_in_any_pieces(said: list[tuple[float, bool]], cut: int) -> None:
    whole, parts = fit([observation(said)]), fit([observation(said[:cut]), observation(said[cut:])])
    assert whole == parts
    assert whole.tokens == len(said)


def test_without_texts_the_student_is_taken_at_its_word() -> None:
    assert fit([]) == Calibration()
    assert Calibration().right(np.log([0.2, 0.5, 0.9])) == pytest.approx([0.2, 0.5, 0.9])


def test_a_student_that_says_what_is_true_is_left_alone() -> None:
    curve = fit([drawn(20_000, lambda said: said)])
    assert (curve.slope, curve.offset) == pytest.approx((1.0, 0.0), abs=0.06)


def test_a_student_that_is_too_sure_is_straightened_on_texts_that_it_was_not_fitted_to() -> None:
    def truth(said: np.ndarray) -> np.ndarray:
        result: np.ndarray = 1 / (1 + np.exp(-(0.4 * np.log(said / (1 - said)) - 0.5)))
        return result

    curve, fresh = fit([drawn(1000, truth)]), drawn(50_000, truth, seed=1)
    assert curve.slope == pytest.approx(0.4, abs=0.1)
    right = curve.right(fresh.log_probs)
    for low in np.arange(0, 1, 0.1):
        inside = (right >= low) & (right < low + 0.1)
        if inside.sum() > 500:
            assert right[inside].mean() == pytest.approx(fresh.hits[inside].mean(), abs=0.06)
    raw = np.exp(fresh.log_probs)
    assert np.abs(raw.mean() - fresh.hits.mean()) > 3 * np.abs(right.mean() - fresh.hits.mean())


def test_a_student_that_is_surer_where_it_is_wrong_gets_one_confidence_for_everything() -> None:
    curve = fit([drawn(2000, lambda said: 1 - said)])
    assert curve.slope == 0
    assert curve.right(np.log([0.1, 0.9])) == pytest.approx([0.5, 0.5], abs=0.05)


def test_an_answer_is_judged_by_the_least_sure_tenth_of_its_tokens() -> None:
    curve = Calibration()
    assert curve.confidence(list(np.log([*[0.9] * 9, 0.2, 0.4, *[0.99] * 9]))) == pytest.approx(0.3)
    assert curve.confidence(list(np.log([0.9, 0.2, 0.4]))) == pytest.approx(0.2)
    assert curve.confidence([math.log(0.7)]) == pytest.approx(0.7)
    assert curve.confidence([]) == 0.0


@settings(deadline=None)
@given(st.lists(logs, min_size=1, max_size=40), st.randoms(use_true_random=False), st.floats(0, 3), st.floats(-3, 3))
def test_confidence_is_a_share_and_knows_no_order_and_sure_tokens_do_not_lower_it(
    log_probs: list[float], random: Random, slope: float, offset: float
) -> None:
    curve = Calibration(slope, offset)
    confidence = curve.confidence(log_probs)
    assert 0 <= confidence <= 1
    shuffled = random.sample(log_probs, len(log_probs))
    assert curve.confidence(shuffled) == pytest.approx(confidence)
    assert curve.confidence([*log_probs, 0.0]) >= confidence - 1e-9


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.floats(0.1, 80))
def test_what_is_observed_are_the_likeliest_tokens_own_probabilities(seed: int, rows: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    logits_TV = (random.standard_normal((rows, 9)) * scale).astype(np.float32)
    targets_T = random.integers(0, 9, rows)
    seen = observe(logits_TV, targets_T)
    wide_TV = np.exp(logits_TV.astype(np.float64) - logits_TV.max())
    expected_T = wide_TV.max(axis=1) / wide_TV.sum(axis=1)
    assert np.exp(seen.log_probs) == pytest.approx(expected_T, rel=1e-4)
    assert (seen.hits == (logits_TV.argmax(axis=1) == targets_T)).all()
