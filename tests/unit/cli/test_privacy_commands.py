"""Privacy budgets and the options of rounds on the command line, against a real control plane."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from cli_world import enrol

from ebbflow.api.v1.feedback_pb2 import Metric, PrivacyPolicy
from ebbflow.cli.commands.privacy_policy import spending
from ebbflow.cli.commands.rounds import read_metric
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Assignment, PrivacyAccount, PrivacyEntry
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.errors import EbbflowError
from ebbflow.common.privacy.accounting import epsilon_of
from ebbflow.common.privacy.calibration import calibrate, complete_policy, with_lifetime

Run = Callable[..., Any]


@pytest.fixture
def serving(cloud: Cloud, student: str) -> None:
    """One agent that serves the student."""
    enrol(cloud, "kiosk-7")
    with cloud.registry.transaction() as session:
        session.add(Assignment(agent_id="kiosk-7", student_id="faq", desired_number=1, serving_number=1))


def charge(cloud: Cloud, window: str, rho_nano: int, times: int) -> None:
    account = {"agent_id": "kiosk-7", "student_id": "faq", "window": window}
    cap = complete_policy(PrivacyPolicy()).rho_cap_nano
    with cloud.registry.transaction() as session:
        session.add(PrivacyAccount(**account, rho_cap_nano=cap, rho_spent_nano=times * rho_nano, delta=1e-6))
        session.flush()
        for number in range(times):
            key = f"{window}-{number}"
            session.add(PrivacyEntry(batch_id=key, round_id=key, rho_nano=rho_nano, create_time=now(), **account))


def test_accounts_tell_epsilon_by_every_law(run: Run, cloud: Cloud, serving: None) -> None:
    cost = calibrate(4.0, 1e-6, 4).rho_nano
    charge(cloud, "2026-10-04", cost, 4)
    charge(cloud, "2026-11-03", cost, 2)
    old, new = run("privacy", "show", "--agent", "kiosk-7", "-o", "json").json
    assert (old["entries"], new["entries"]) == (4, 2)
    assert old["epsilonSpent"] == pytest.approx(4.0, abs=0.01)
    assert old["epsilonLeft"] == pytest.approx(0.0, abs=0.01)
    assert old["epsilonGaussian"] == pytest.approx(epsilon_of(4 * cost, 1e-6))
    assert old["epsilonZcdp"] == pytest.approx(4.28, abs=0.01)
    for account in (old, new):
        assert account["epsilonSpent"] == max(account["epsilonGaussian"], account["epsilonPld"])
        assert account["epsilonGaussian"] <= account["epsilonPld"] < account["epsilonZcdp"]
        assert account["epsilonLifetime"] == pytest.approx(epsilon_of(6 * cost, 1e-6), rel=0.01)
    head, first, _ = run("privacy", "show").out.splitlines()
    assert head.split()[:5] == ["AGENT", "STUDENT", "WINDOW", "EPSILON", "SPENT"]
    assert first.split()[:3] == ["agents/kiosk-7", "students/faq", "2026-10-04"]
    assert run("privacy", "show", "--agent", "other", "-o", "json").json == []


def test_the_first_policy_is_shown_with_what_it_means_over_a_year(run: Run, student: str) -> None:
    shown = run("privacy", "policy", "show", "faq").out
    assert "epsilon           2 at delta 1e-06" in shown
    assert "version 1, 20" in shown
    assert "12 windows, 24 rounds" in shown
    assert "no limit" in shown


def test_twelve_windows_of_the_default_are_told_as_they_compose() -> None:
    rows = [line.split() for line in spending(complete_policy(PrivacyPolicy()))]
    found = {row[0]: [float(value) for value in row[-4:]] for row in rows if row[0] in {"1", "12"} and "rounds" in row}
    assert found["1"] == pytest.approx([4.0, 4.0, 4.0, 4.28], abs=0.01)
    assert found["12"] == pytest.approx([17.41, 17.41, 17.41, 18.44], abs=0.02)


def test_an_owner_changes_a_policy_and_sees_the_arithmetic_first(run: Run, student: str) -> None:
    change = ["privacy", "policy", "set", "faq", "--epsilon", "2", "--lifetime-epsilon", "6", "--note", "stricter"]
    refused = run(*change)
    assert refused.code == 1, "nobody has said yes"
    assert "A user who votes in every round" in refused.err
    assert run("privacy", "policy", "show", "faq", "-o", "json").json["version"] == 1
    made = run(*change, "--yes", "-o", "json")
    assert made.code == 0, made.err
    assert (made.json["version"], made.json["policy"]["epsilon"], made.json["note"]) == (2, 2.0, "stricter")
    kept = run("privacy", "policy", "set", "faq", "--retention-days", "30", "--note", "shorter", "--yes", "-o", "json")
    policy = kept.json["policy"]
    assert (policy["epsilon"], policy["retentionDays"]) == (2.0, 30)
    assert policy["lifetimeRhoCapNano"] == made.json["policy"]["lifetimeRhoCapNano"] != "0"
    freed = run("privacy", "policy", "set", "faq", "--lifetime-epsilon", "0", "--note", "free", "--yes", "-o", "json")
    assert freed.json["policy"]["lifetimeRhoCapNano"] == "0"
    history = run("privacy", "policy", "show", "faq", "--history").out.splitlines()
    assert [line.split()[0] for line in history] == ["VERSION", "4", "3", "2", "1"]


def test_a_policy_that_makes_no_sense_is_refused(run: Run, student: str) -> None:
    wrong = run("privacy", "policy", "set", "faq", "--epsilon", "-1", "--note", "x", "--yes")
    assert (wrong.code, "epsilon must be" in wrong.err) == (3, True)
    assert run("privacy", "policy", "show", "none").code == 4


def test_without_the_accountant_the_other_laws_still_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    policy = with_lifetime(PrivacyPolicy(epsilon=1.7), 5.0)
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    lines = spending(policy)
    [window] = [line.split() for line in lines if line.startswith("1 window")]
    quoted, exact, gaussian, zcdp = window[-4:]
    assert (quoted, exact) == (gaussian, "-")
    assert float(zcdp) > float(gaussian) == pytest.approx(1.7, abs=0.01)
    assert "at most epsilon 5" in lines[-1]


def test_an_operator_says_what_a_round_collects(run: Run, serving: None) -> None:
    options = ["--metric", "accepted=3", "--metric", "near", "--measure", "student", "--near", "0.4"]
    made = run("round", "open", "faq", *options, "--max-users", "40", "-o", "json")
    assert made.code == 0, made.err
    plan = made.json["plan"]
    assert [(metric["kind"], metric["cap"]) for metric in plan["metrics"]] == [("KIND_ACCEPTED", 3), ("KIND_NEAR", 1)]
    assert (plan["measure"], plan["nearMicro"], plan["maxUsers"]) == ("MEASURE_STUDENT", 400_000, 40)
    assert plan["mechanism"]["sensitivitySquared"] == 11


def test_an_adapter_round_needs_a_policy_that_allows_it(run: Run, serving: None) -> None:
    refused = run("round", "open", "faq", "--adapter", "--users-per-agent", "50")
    assert refused.code in {4, 5}, refused.err
    wrong = run("round", "open", "faq", "--rank", "2")
    assert (wrong.code, "--adapter" in wrong.err) == (3, True)
    assert run("round", "open", "faq", "--population", "7").code == 4


@pytest.mark.parametrize("text", ["", "seen", "accepted=-1", "accepted=x", "near=0.5"])
def test_a_counter_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(EbbflowError):
        read_metric(text)


def test_counters_are_read() -> None:
    assert read_metric("failed=7") == Metric(kind=Metric.KIND_FAILED, cap=7)
    assert read_metric("near") == Metric(kind=Metric.KIND_NEAR, cap=1)


def test_json_of_a_policy_is_the_contracts(run: Run, student: str) -> None:
    found = json.loads(run("privacy", "policy", "show", "faq", "-o", "json").out)
    assert found["student"] == "students/faq"
    assert found["policy"]["windowDays"] == 30
