"""What a round is worth, told beforehand."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.privacy.forecast import Question, forecast

MEASURED = Path(__file__).resolve().parents[3] / "docs" / "explanation" / "what-feedback-is-worth.json"


def test_noise_is_what_the_policy_adds() -> None:
    found = forecast(Question(agents=400, users=20, epsilon=4.0))
    assert found.agent_noise_std == pytest.approx(math.sqrt(variance_of(calibrate(4.0, 1e-6, 4))))
    assert found.noise_std == pytest.approx(20 * found.agent_noise_std)
    assert found.users_needed == math.ceil(3 * found.noise_std)


def test_the_same_question_has_the_same_answer() -> None:
    question = Question(agents=30, users=5, epsilon=2.0, bins=7)
    assert forecast(question) == forecast(question)


@pytest.mark.parametrize("bins", [10, 60])
def test_more_agents_a_larger_epsilon_and_fewer_rounds_tell_more(bins: int) -> None:
    def told(agents: int = 100, epsilon: float = 2.0, rounds: int = 4) -> tuple[float, float, float]:
        found = forecast(Question(agents, 20, epsilon, bins, rounds))
        return found.gain_share, found.bins_seen, -found.error

    plain = told()
    for better in (told(agents=1000), told(epsilon=8.0), told(rounds=1)):
        assert all(more > less for more, less in zip(better, plain, strict=True))


def test_a_large_fleet_has_all_of_the_gain_and_a_lone_agent_nearly_none() -> None:
    large, alone = (forecast(Question(agents, 20, 1.0)) for agents in (100_000, 1))
    assert large.gain_share == pytest.approx(1.0, abs=0.02)
    assert large.bins_seen == 1.0
    assert large.error == pytest.approx(large.error_without_noise, abs=0.02)
    assert alone.gain_share < 0.2
    assert alone.bins_seen < 0.05


def test_where_all_ask_for_everything_alike_nothing_is_to_be_gained() -> None:
    found = forecast(Question(agents=1000, users=20, epsilon=4.0, skew=0.0))
    assert found.error_without_feedback == pytest.approx(0.0, abs=1e-12)
    assert found.gain_share == 0.0


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 10**7), st.integers(1, 10**6), st.floats(0.5, 16), st.integers(2, 40), st.integers(1, 30))
def test_every_figure_is_possible(agents: int, users: int, epsilon: float, bins: int, rounds: int) -> None:
    found = forecast(Question(agents, users, epsilon, bins, rounds))
    assert 0 <= found.bins_seen <= 1
    assert all(0 <= error <= 2 for error in (found.error, found.error_without_noise, found.error_without_feedback))
    assert found.gain_share <= 1.2
    assert all(math.isfinite(value) for value in vars(found).values())


@pytest.mark.parametrize(
    ("field", "value"),
    [("agents", 0), ("users", 0), ("bins", 1), ("bins", 257), ("skew", -1.0), ("skew", math.nan), ("agents", 10**8)],
)
def test_what_cannot_be_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(EbbflowError) as caught:
        Question(**{"agents": 1, "users": 1, "epsilon": 4.0, field: value})  # type: ignore[arg-type]
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(("name", "bins", "skew"), [("10 topics", 10, 1.0), ("150 topics", 150, 0.8)])
def test_the_calculator_says_what_trained_students_gained(name: str, bins: int, skew: float) -> None:
    rows = json.loads(MEASURED.read_text())["rows"][name]
    measured = {
        (row["agents"], row["epsilon"], row["rounds"]): row["gain_share"]
        for row in rows
        if row["gain_share"] is not None and row["agents"] >= 10 and row["epsilon"] in {1.0, 4.0}
    }
    assert len(measured) == 16
    apart = []
    for agents, epsilon in {key[:2] for key in measured}:
        told = forecast(Question(agents, 20, epsilon, bins, skew=skew))
        apart.append(told.gain_share - measured[agents, epsilon, 1])
        apart.append(told.window_gain_share - measured[agents, epsilon, 4])
    assert abs(sum(apart) / len(apart)) < 0.06, apart
    assert max(map(abs, apart)) < 0.25, apart
