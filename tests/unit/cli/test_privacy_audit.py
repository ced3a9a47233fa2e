"""`ebbflow privacy audit` needs no cloud, tells what it tested, and ends with 1 where a build leaks."""

from collections.abc import Callable
from typing import Any

import pytest

from ebbflow.common.privacy import release
from ebbflow.common.privacy.gaussian import DiscreteGaussian

Run = Callable[..., Any]


def test_every_mechanism_is_audited_and_passes(run_alone: Run) -> None:
    done = run_alone("privacy", "audit", "--runs", "1000", "--policy", "2", "-o", "json")
    assert done.code == 0, done.err
    found = done.json
    assert {finding["mechanism"] for finding in found} == {"votes", "metrics", "adapters", "sampler"}
    assert {finding["epsilon"] for finding in found} == {2.0}
    assert not any(finding["failed"] for finding in found)
    assert done.err.endswith("no leak was found\n")


def test_the_table_names_each_policy_test_and_claim(run_alone: Run) -> None:
    done = run_alone("privacy", "audit", "--runs", "1000", "--mechanism", "sampler", "--policy", "1", "--policy", "4")
    assert [line.split()[:3] for line in done.out.splitlines()[1::2]] == [
        ["sampler", policy, "fits"] for policy in "14"
    ]
    done = run_alone("privacy", "audit", "--runs", "1000", "--mechanism", "votes", "--rounds-per-window", "1")
    head, first, second, third, *_ = done.out.splitlines()
    assert head.split() == ["MECHANISM", "EPSILON", "TEST", "RUNS", "MEASURED", "CLAIM", "RESULT"]
    assert (first.split()[:3], first.split()[-3:]) == (["votes", "4", "scale,"], ["about", "1", "pass"])
    assert ("influence, the user's bin" in second, "mu of a round, the user's bin" in third) == (True, True)
    assert "window" not in done.out


def test_a_build_that_leaks_ends_with_1(run_alone: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "DiscreteGaussian", lambda variance: DiscreteGaussian(variance / 4))
    done = run_alone("privacy", "audit", "--runs", "2000", "--mechanism", "votes", "--policy", "8")
    assert done.code == 1
    assert "scale, the user's bin" in next(line for line in done.out.splitlines() if line.endswith("FAIL"))
    assert "tests FAILED" in done.err


@pytest.mark.parametrize("arguments", [("--policy", "1000"), ("--delta", "2"), ("--policy", "0.05", "--runs", "1000")])
def test_a_policy_that_cannot_be_is_refused_in_words(run_alone: Run, arguments: tuple[str, ...]) -> None:
    done = run_alone("privacy", "audit", "--mechanism", "adapters", *arguments)
    assert done.code not in (0, 1)
    assert "error:" in done.err


def test_fewer_runs_than_prove_anything_are_a_mistake_of_the_command_line(run_alone: Run) -> None:
    assert run_alone("privacy", "audit", "--runs", "10").code == 2
