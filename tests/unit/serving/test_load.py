"""What the load says is what happened, and what is long past is forgotten."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.edge.serving.load import FIRST_TOKEN_WINDOW_S, TOKENS_WINDOW_S, LoadMeter


def test_nothing_happened_yet() -> None:
    load = LoadMeter().read(0, 0, 0, 10.0)
    assert (load.step_s, load.first_token_s, load.tokens_per_s) == (0.0, None, 0.0)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=400))
def test_the_first_token_time_is_the_95th_percentile(times_s: list[float]) -> None:
    meter = LoadMeter()
    for seconds in times_s:
        meter.first_token(seconds, 100.0)
    found_s = meter.read(0, 0, 0, 101.0).first_token_s
    assert found_s is not None
    assert sum(seconds <= found_s for seconds in times_s) >= 0.95 * len(times_s)
    assert sum(seconds >= found_s for seconds in times_s) >= max(1, int(0.05 * len(times_s)))
    assert meter.read(0, 0, 0, 100.0 + FIRST_TOKEN_WINDOW_S).first_token_s is None


def test_tokens_count_for_five_seconds() -> None:
    meter = LoadMeter()
    for second in range(10):
        meter.step(0.01, 20, float(second))
    assert meter.read(0, 0, 0, 9.0).tokens_per_s == pytest.approx(20.0)
    assert meter.read(0, 0, 0, 9.0 + TOKENS_WINDOW_S).tokens_per_s == 0.0


def test_a_steps_time_follows_what_steps_take() -> None:
    meter = LoadMeter()
    meter.step(0.01, 0, 0.0)
    assert meter.read(0, 0, 0, 0.0).step_s == pytest.approx(0.01)
    for _ in range(50):
        meter.step(0.03, 1, 0.0)
    assert meter.read(3, 2, 70, 0.0).step_s == pytest.approx(0.03, rel=0.02)
