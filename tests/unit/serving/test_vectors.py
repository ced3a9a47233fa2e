"""The quick ways over a vocabulary give what the plain ones give."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ebbflow.edge.serving.vectors import at_least_kth, draw, largest, log_sum_exp, nucleus, unit

# Few different values, so that many are equal; lengths on both sides of the blocks of 256.
VALUES = hnp.arrays(np.int8, st.integers(1, 900), elements=st.integers(0, 40)).map(lambda a: a.astype(np.float32) / 8)
WEIGHTS = VALUES.map(lambda values: np.append(values, np.float32(1)))


@given(VALUES, st.integers(1, 1000))
def test_the_largest_are_those_of_a_full_sort(values: np.ndarray, count: int) -> None:
    expected = np.argsort(-values, kind="stable")[:count]
    np.testing.assert_array_equal(largest(values, count), expected)
    np.testing.assert_array_equal(at_least_kth(values, count), np.sort(expected))


@example(np.ones(4, np.float32), 0.5)
@given(WEIGHTS, st.floats(0.001, 0.999))
def test_a_nucleus_is_the_smallest_set_that_reaches_its_share(weights: np.ndarray, share: float) -> None:
    kept = nucleus(weights, share)
    falling = np.argsort(-weights, kind="stable")
    np.testing.assert_array_equal(kept, np.sort(falling[: len(kept)]))
    wide, total = weights.astype(np.float64), weights.astype(np.float64).sum()
    slack = 1e-5 * total
    assert wide[kept].sum() >= share * total - slack
    assert wide[falling[: len(kept) - 1]].sum() <= share * total + slack


@given(WEIGHTS, st.floats(0, 1, exclude_max=True))
def test_a_draw_lands_where_the_running_sum_passes_its_share(weights: np.ndarray, share: float) -> None:
    place = draw(weights, share)
    assert weights[place] > 0
    running = np.cumsum(weights.astype(np.float64))
    slack = 1e-4 * running[-1]
    assert running[place] >= share * running[-1] - slack
    assert running[place] - weights[place] <= share * running[-1] + slack


@pytest.mark.parametrize("share", [0.0, 0.5, float(np.nextafter(1, 0))])
def test_what_weighs_nothing_is_never_drawn(share: float) -> None:
    weights = np.zeros(1000, np.float32)
    weights[300] = 1e-30
    assert draw(weights, share) == 300


@given(hnp.arrays(np.float32, st.integers(1, 500), elements=st.floats(-80, 80, width=32)))
def test_log_sum_exp_agrees_with_float64(logits: np.ndarray) -> None:
    assert log_sum_exp(logits) == pytest.approx(np.logaddexp.reduce(logits.astype(np.float64)), abs=1e-4)


def test_unit_vectors_have_length_one_and_nothing_stays_nothing() -> None:
    assert np.linalg.norm(unit(np.array([3, 4], np.float32))) == pytest.approx(1)
    assert not unit(np.zeros(3, np.float32)).any()
