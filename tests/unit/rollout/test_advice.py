"""How many agents a canary needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cloud.rollout import advice


@pytest.mark.parametrize(("rate", "agents"), [(0.05, 59), (0.1, 29), (0.01, 299), (0.5, 5), (1.0, 1)])
def test_the_known_sizes_of_canaries(rate: float, agents: int) -> None:
    assert advice.agents_needed(rate) == agents


@given(rate=st.floats(1e-4, 0.999), confidence=st.floats(0.5, 0.999))
def test_so_many_agents_suffice_and_one_fewer_does_not(rate: float, confidence: float) -> None:
    agents = advice.agents_needed(rate, confidence)
    assert 1 - (1 - rate) ** agents >= confidence - 1e-9
    assert agents == 1 or 1 - (1 - rate) ** (agents - 1) < confidence + 1e-9


@given(agents=st.integers(1, 100_000), confidence=st.floats(0.5, 0.999))
def test_what_agents_can_see_is_what_they_are_needed_for(agents: int, confidence: float) -> None:
    rate = advice.detectable_rate(agents, confidence)
    assert 1 - (1 - rate) ** agents == pytest.approx(confidence)
    assert advice.agents_needed(rate, confidence) == agents


def test_nobody_sees_nothing() -> None:
    assert advice.detectable_rate(0) == 1.0


@pytest.mark.parametrize(
    ("rate", "confidence"), [(0.0, 0.95), (1.1, 0.95), (0.1, 0.0), (0.1, 1.0), (float("nan"), 0.9)]
)
def test_rates_that_are_none_are_refused(rate: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="out of range"):
        advice.agents_needed(rate, confidence)
    with pytest.raises(ValueError, match="out of range"):
        advice.detectable_rate(-1)
