"""The commands of rollouts against the real services."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import add_release, enrol

from ebbflow.cloud.registry.tables import DeviceState, RolloutDevice
from ebbflow.cloud.services.cloud import Cloud

Run = Callable[..., Any]


@pytest.fixture
def fleet(cloud: Cloud, student: str) -> Cloud:
    """Two releases, and ten agents of which two are canaries."""
    for number in (1, 2):
        add_release(cloud, number)
    for index in range(10):
        enrol(cloud, f"kiosk-{index}", ring="canary" if index < 2 else "main")
    return cloud


def start(run: Run, release: str, *options: str) -> Any:
    made = run("rollout", "start", release, *options, "-o", "json")
    assert made.code == 0, made.err
    return made.json


def fail(cloud: Cloud, name: str, agent_id: str) -> None:
    with cloud.registry.transaction() as session:
        device = session.get_one(RolloutDevice, (name.removeprefix("rollouts/"), agent_id))
        device.state, device.reason = DeviceState.FAILED, "OUT_OF_MEMORY"


@pytest.mark.usefixtures("fleet")
def test_a_rollout_keeps_everything_that_was_typed(run: Run) -> None:
    phases = ["--phase", "count=1 selector=ring=canary soak=1h probe-rise=0.02", "--phase", "50% failure=0.1"]
    rules = ["--window", "22:00-06:00 Europe/Berlin", "--spread", "30m", "--on-halt", "roll-back"]
    made = start(run, "faq/2", *phases, *rules)
    first, second, last = made["phases"]
    assert (first["count"], first["selector"], first["soak"], first["maxProbeRise"]) == (
        1,
        "ring=canary",
        "3600s",
        0.02,
    )
    assert (second["share"], second["failureShare"], last["share"]) == (0.5, 0.1, 1.0)
    assert made["windows"][0]["duration"] == "28800s"
    assert (made["spread"], made["onHalt"], made["creator"]) == ("1800s", "ON_HALT_ROLL_BACK", "admins/owner")
    shown = run("rollout", "show", made["name"]).out
    for fact in ("1 of ring=canary", "0/1", "0/5", "0/4", "by owner, open 22:00 8h Europe/Berlin", "next"):
        assert fact in shown, shown


@pytest.mark.usefixtures("fleet")
def test_a_preview_counts_the_fleet_and_starts_nothing(run: Run) -> None:
    seen = run("rollout", "start", "faq/2", "--phase", "selector=ring=canary", "--phase", "50%", "--preview")
    assert seen.code == 0, seen.err
    rows = [line.split() for line in seen.out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[0][1:4] == ["ring=canary", "2", "0"]
    assert "59 canaries" in seen.err
    assert run("rollout", "list", "-o", "json").json == []


@pytest.mark.usefixtures("fleet")
def test_a_policy_holds_for_what_a_rollout_does_not_say(run: Run, run_alone: Run, viewer_context: Path) -> None:
    rules = ["--phase", "count=2 soak=1h", "--window", "sat,sun 00:00 1d", "--spread", "10m", "--kept-releases", "20"]
    changed = run("student", "policy", "faq", *rules)
    assert changed.code == 0, changed.err
    for fact in ("count=2 soak=1h", "sat-sun 00:00 1d UTC", "10m", "20"):
        assert fact in changed.out
    assert run("student", "policy", "faq").out == changed.out
    made = start(run, "faq/2", "--min-answers", "2")
    assert [(phase["count"], phase["minAnswers"]) for phase in made["phases"]] == [(2, 2), (0, 2)]
    assert (made["windows"][0]["weekdays"], made["spread"]) == ([6, 7], "600s")
    assert start(run, "faq/2", "--window", "always", "--spread", "0s")["spread"] == "0s"
    refused = run_alone("--context", str(viewer_context), "student", "policy", "faq", "--no-approval")
    assert refused.code == 6
    assert run("student", "policy", "faq", "--window", "mon 03:00 1h Nowhere/Land").code == 3


@pytest.mark.usefixtures("fleet")
def test_a_second_person_approves(run: Run, run_alone: Run, tmp_path: Path) -> None:
    assert run("student", "policy", "faq", "--approval").code == 0
    name = start(run, "faq/2")["name"]
    assert "waiting for approval" in run("rollout", "show", name).out
    own = run("rollout", "approve", name)
    assert (own.code, "ebbflow rollout approve" in own.err) == (5, True)
    bob = run("admin", "create", "bob", "--role", "operator", "--out", str(tmp_path / "bob")).out.strip()
    done = run_alone("--context", bob, "rollout", "approve", name, "-o", "json")
    assert (done.json["state"], done.json["approver"]) == ("STATE_RUNNING", "admins/bob")


def test_failures_are_shown_and_tried_again(run: Run, fleet: Cloud) -> None:
    name = start(run, "faq/2", "--phase", "1", "--failure-share", "0.5", "--min-answers", "9")["name"]
    fail(fleet, name, "kiosk-3")
    fail(fleet, name, "kiosk-4")
    assert "2 OUT_OF_MEMORY: kiosk-3, kiosk-4" in run("rollout", "show", name).out
    assert run("rollout", "retry", name, "--agent", "kiosk-3").code == 0
    assert "1 OUT_OF_MEMORY: kiosk-4" in run("rollout", "show", name).out
    assert run("rollout", "retry", name, "--agent", "nobody").code == 4
    assert run("rollout", "retry", name, "-o", "json").json["failures"] == []


@pytest.mark.usefixtures("fleet")
def test_going_back_starts_a_rollout_of_the_release_before(run: Run) -> None:
    start(run, "faq/2")
    back = run("rollout", "back", "faq", "--to", "1", "--yes", "-o", "json")
    assert back.code == 0, back.err
    assert back.json["release"] == "students/faq/releases/1"
    states = [rollout["state"] for rollout in run("rollout", "list", "-o", "json").json]
    assert "STATE_RUNNING" not in states[1:]
    assert run("rollout", "back", "faq", "--to", "9", "--yes").code == 4


@pytest.mark.usefixtures("fleet")
def test_an_agent_is_pinned_and_let_go(run: Run) -> None:
    pinned = run("agent", "pin", "kiosk-7", "--release", "faq/1", "--reason", "slow board", "-o", "json")
    assert pinned.code == 0, pinned.err
    assert pinned.json["pins"][0]["reason"] == "slow board"
    row = next(line for line in run("agent", "list").out.splitlines() if "kiosk-7" in line)
    assert "faq/1" in row.split()
    assert run("agent", "unpin", "kiosk-7", "--student", "faq", "-o", "json").json["pins"] == []
    assert run("agent", "pin", "kiosk-7", "--release", "faq/9", "--reason", "none").code == 4


@pytest.mark.usefixtures("fleet")
def test_a_revoked_release_never_comes_back(run: Run) -> None:
    name = start(run, "faq/2")["name"]
    revoked = run("release", "revoke", "faq/2", "--reason", "wrong dosages", "--yes")
    assert revoked.code == 0, revoked.err
    assert run("release", "show", "faq/2", "-o", "json").json["state"] == "STATE_REVOKED"
    assert run("rollout", "show", name, "-o", "json").json["state"] == "STATE_ABORTED"
    assert run("rollout", "start", "faq/2").code == 5
    watched = run("release", "watch", "faq/2")
    assert (watched.code, "wrong dosages" in watched.err) == (5, True)
    assert run("release", "watch", "faq/1").code == 0


@pytest.mark.usefixtures("fleet")
def test_the_lowest_release_can_be_raised_by_an_owner(run: Run, run_alone: Run, viewer_context: Path) -> None:
    assert run_alone("--context", str(viewer_context), "release", "min", "faq/2", "--yes").code == 6
    raised = run("release", "min", "faq/2", "--yes", "-o", "json")
    assert raised.code == 0, raised.err
    assert raised.json == {"name": "students/faq/releases/2"}
