import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cloud.distillation.schedule import FLOOR, Schedule


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    schedule = Schedule(peak=2.0, steps=100, warmup_steps=4)
    assert [schedule.rate(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_the_last_step_is_a_tenth_of_the_peak() -> None:
    assert Schedule(peak=2.0, steps=100, warmup_steps=4).rate(99) == pytest.approx(0.2)


@given(steps=st.integers(1, 500), warmup=st.integers(0, 600))
def test_rates_stay_positive_and_fall_after_the_warm_up(steps: int, warmup: int) -> None:
    schedule = Schedule(peak=1.0, steps=steps, warmup_steps=min(warmup, steps))
    rates = [schedule.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    after = rates[schedule.warmup_steps :]
    assert all(a >= b >= FLOOR - 1e-12 for a, b in itertools.pairwise(after))
