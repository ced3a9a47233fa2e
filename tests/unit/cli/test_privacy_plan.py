from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., Any]


def test_a_plan_is_told_in_words_without_a_cloud(run_alone: Run) -> None:
    shown = run_alone("privacy", "plan", "--agents", "1000", "--users", "20", "--epsilon", "4")
    assert shown.code == 0, shown.err
    assert "2.39 (standard deviation)" in shown.out
    assert "227 of 20,000" in shown.out
    assert "100% of 10" in shown.out
    assert shown.out.splitlines()[-1] == "A round is worth its budget."


def test_a_small_fleet_is_told_what_it_lacks(run_alone: Run) -> None:
    shown = run_alone("privacy", "plan", "--agents", "3", "--users", "5", "--epsilon", "1", "--bins", "40")
    words = "A round is mostly noise: it needs fewer topics, fewer rounds than 4 in a window, more agents or users or "
    assert shown.out.splitlines()[-1] == words + "a larger epsilon."
    one = run_alone("privacy", "plan", "--agents", "3", "--users", "5", "--epsilon", "1", "--rounds", "1")
    assert "fewer" not in one.out.splitlines()[-1]


def test_json_holds_question_and_answer(run_alone: Run) -> None:
    found = run_alone("privacy", "plan", "--agents", "100", "--users", "20", "--rounds", "1", "-o", "json").json
    assert (found["agents"], found["users"], found["epsilon"], found["rounds"]) == (100, 20, 4.0, 1)
    assert found["noise_std"] == pytest.approx(10 * found["agent_noise_std"])
    assert 0.5 < found["gain_share"] <= 1.1


@pytest.mark.parametrize(
    ("option", "value"), [("--agents", "0"), ("--bins", "1"), ("--epsilon", "0"), ("--delta", "1")]
)
def test_what_cannot_be_is_refused(run_alone: Run, option: str, value: str) -> None:
    arguments = {"--agents": "10", "--users": "20"} | {option: value}
    refused = run_alone("privacy", "plan", *[word for pair in arguments.items() for word in pair])
    assert refused.code == 3
    assert option.removeprefix("--") in refused.err
