import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import add_release, enrol

from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    Distillation,
    DistillationState,
    ReleaseState,
)
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.identity.tokens import EnrolmentSecret

Run = Callable[..., Any]


def test_a_token_is_printed_alone_and_works_once_revoked_no_more(run: Run, cloud: Cloud) -> None:
    made = run("token", "create", "--uses", "3", "--lifetime", "1d", "--label", "site=berlin")
    assert made.code == 0, made.err
    secret = EnrolmentSecret.decode(made.out)
    assert secret.authority_sha256 == cloud.authority.sha256
    assert "3 uses" in made.err
    (listed,) = run("token", "list", "-o", "json").json
    assert (listed["usesLeft"], listed["labels"]) == (3, {"site": "berlin"})
    assert secret.secret not in str(listed)
    assert run("token", "revoke", secret.token_id, "-o", "json").json["revoked"] is True
    assert run("token", "revoke", "nobody").code == 4


def test_agents_are_listed_labelled_revoked_and_reinstated(run: Run, cloud: Cloud) -> None:
    enrol(cloud, "kiosk-7", site="berlin")
    enrol(cloud, "kiosk-8", site="bonn")
    assert [agent["name"] for agent in run("agent", "list", "-l", "site=bonn", "-o", "json").json] == ["agents/kiosk-8"]
    assert [agent["name"] for agent in run("agent", "list", "--limit", "1", "-o", "json").json] == ["agents/kiosk-7"]
    table = run("agent", "list").out.splitlines()
    assert table[0].split()[:2] == ["NAME", "STATE"]
    assert table[1].split()[:3] == ["agents/kiosk-7", "active", "no"]
    assert run("agent", "label", "kiosk-7", "ring=beta", "site-", "-o", "json").json["labels"] == {"ring": "beta"}
    with cloud.registry.transaction() as session:
        session.get_one(Agent, "kiosk-7").state = AgentState.QUARANTINED
    assert run("agent", "reinstate", "agents/kiosk-7", "-o", "json").json["state"] == "STATE_ACTIVE"
    assert run("agent", "revoke", "kiosk-7", "--reason", "stolen").code == 1, "nobody has said yes"
    gone = run("agent", "revoke", "kiosk-7", "--reason", "stolen", "--yes", "-o", "json").json
    assert (gone["state"], gone["reason"]) == ("STATE_REVOKED", "stolen")
    assert "state: STATE_REVOKED" in run("agent", "get", "kiosk-7").out


def test_students_are_created_listed_and_shown(run: Run, student: str) -> None:
    assert run("student", "list").out.splitlines()[1].split()[:4] == ["students/faq", "/models/teacher", "2", "2"]
    assert run("student", "show", "faq", "-o", "json").json["name"] == student
    assert "  hidden_size: 64" in run("student", "show", "students/faq").out


def test_a_student_without_shape_or_corpus_says_what_is_missing(run: Run, corpus: Path) -> None:
    bare = run("student", "create", "faq", "--teacher", "t", "--corpus", str(corpus), "--hidden-size", "64")
    assert bare.code == 3
    assert "num_hidden_layers" in bare.err
    lost = run("student", "create", "faq", "--teacher", "t", "--corpus", "/none", "--initial-checkpoint", "/c")
    assert lost.code == 3
    assert "/none" in lost.err


def test_a_broken_corpus_is_refused_with_the_servers_words(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("not json\n")
    arguments = ["--corpus", str(tmp_path / "corpus"), "--initial-checkpoint", "/c"]
    refused = run("student", "create", "faq", "--teacher", "t", *arguments)
    assert refused.code == 3
    assert "cure: Every line must be JSON" in refused.err


def test_distillations_are_queued_listed_and_cancelled(run: Run, student: str) -> None:
    recipe = ["--steps", "7", "--batch-size", "2", "--mixture", "datetime=3", "--mixture", "json=1"]
    recipe += ["--keep-bf16", "lm_head.*", "--keep-bf16", "model.layers.0.*"]
    made = run("distillation", "start", "faq", *recipe, "-o", "json")
    assert made.code == 0, made.err
    assert (made.json["student"], made.json["recipe"]["steps"]) == (student, 7)
    assert made.json["recipe"]["keepBf16"] == ["lm_head.*", "model.layers.0.*"]
    name = made.json["name"].removeprefix("distillations/")
    assert run("distillation", "list", "--student", "faq").out.splitlines()[1].split()[2:4] == ["queued", "0/7"]
    assert run("distillation", "cancel", name).out.splitlines()[1].split()[2] == "cancelled"
    assert run("distillation", "show", name, "-o", "json").json["state"] == "STATE_CANCELLED"
    watched = run("distillation", "watch", name)
    assert watched.code == 5
    assert f"distillations/{name} cancelled" in watched.err


def test_private_texts_go_along_with_an_order(run: Run, cloud: Cloud, student: str, tmp_path: Path) -> None:
    path = tmp_path / "private.jsonl"
    path.write_text("".join(json.dumps({"topic": "t", "text": f"text {number}"}) + "\n" for number in range(5)))
    private = ["--private-corpus", str(path), "--private-epsilon", "4", "--private-steps", "3"]
    refused = run("distillation", "start", "faq", "--steps", "7", *private)
    assert (refused.code != 0, "--private-corpus-size" in refused.err) == (True, True)
    private += ["--private-corpus-size", "100", "--private-rank", "2"]
    made = run("distillation", "start", "faq", "--steps", "7", *private, "-o", "json")
    assert made.code == 0, made.err
    assert "has 5 texts, far fewer than --private-corpus-size 100" in made.err
    training = made.json["privateTraining"]
    assert (training["epsilon"], training["corpusSize"], training["batchSize"], training["rank"]) == (4.0, 100, 64, 2)
    assert made.json["privateCorpusSha256"] == ""
    assert run("distillation", "list").out.splitlines()[1].split()[3] == "0/10", "the steps of both parts"
    with cloud.registry.reading() as session:
        (row,) = session.query(Distillation).all()
    assert b"text 4" in cloud.blobs.read(row.private_corpus_sha256)
    missing = run("distillation", "start", "faq", *private[2:], "--private-corpus", str(tmp_path / "none"))
    assert (missing.code != 0, "cannot be read" in missing.err) == (True, True)


def private_order(path: Path) -> list[str]:
    path.write_text("".join(json.dumps({"topic": "t", "text": f"text {number}"}) + "\n" for number in range(5)))
    private = ["--private-corpus", str(path), "--private-epsilon", "4", "--private-steps", "3"]
    return ["distillation", "start", "faq", "--steps", "7", *private, "--private-corpus-size", "5"]


def test_who_trains_on_the_same_texts_again_is_told_what_that_adds_up_to(
    run: Run, student: str, tmp_path: Path
) -> None:
    order = private_order(tmp_path / "private.jsonl")
    first = run(*order, "-o", "json")
    assert (first.code, "learn from these texts" in first.err) == (0, False)
    second = run(*order)
    assert f"2 distillations learn from these texts ({first.json['name']})" in second.err
    assert "epsilon 8 at delta 2e-06" in second.err
    shown = run("distillation", "show", first.json["name"].removeprefix("distillations/"))
    assert "epsilon: 8.0" in shown.out


def test_private_texts_are_forgotten_by_distillation_and_by_file(
    run: Run, cloud: Cloud, student: str, tmp_path: Path
) -> None:
    path = tmp_path / "private.jsonl"
    made = run(*private_order(path), "-o", "json").json["name"].removeprefix("distillations/")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256 not in run("audit", "list", "-o", "json").out, "it would confirm a guess of the texts to any viewer"
    refused = run("distillation", "forget", made)
    assert (refused.code != 0, "cancel it first" in refused.err) == (True, True)
    run("distillation", "cancel", made)
    assert (run("distillation", "forget", made).err.strip(), cloud.blobs.has(sha256)) == ("deleted", False)
    cloud.blobs.put([path.read_bytes()])
    assert run("distillation", "forget", "--private-corpus", str(path)).err.strip() == "deleted"
    assert "nothing to delete" in run("distillation", "forget", "--private-corpus", str(path)).err
    assert "cannot be read" in run("distillation", "forget", "--private-corpus", str(tmp_path / "none")).err
    assert run("distillation", "forget").code != 0


def test_private_texts_of_a_refused_order_do_not_stay_unless_a_distillation_needs_them(
    run: Run, cloud: Cloud, student: str, tmp_path: Path
) -> None:
    path = tmp_path / "private.jsonl"
    order = private_order(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    wrong = [*order, "--base-release", "faq/9"]
    refused = run(*wrong)
    assert (refused.code != 0, "faq/releases/9" in refused.err) == (True, True)
    assert not cloud.blobs.has(sha256)
    assert run(*order).code == 0
    assert run(*wrong).code != 0
    assert cloud.blobs.has(sha256)


def test_waiting_for_a_distillation_ends_with_its_end(run: Run, cloud: Cloud, student: str) -> None:
    import threading
    import time

    def work() -> None:
        for _ in range(1200):
            time.sleep(0.05)
            with cloud.registry.transaction() as session:
                rows = session.query(Distillation).all()
                if rows:
                    rows[0].state, rows[0].step, rows[0].error = DistillationState.FAILED, 3, "the disk is full"
                    return

    worker = threading.Thread(target=work)
    worker.start()
    ended = run("distillation", "start", "faq", "--steps", "5", "--wait", "-o", "json")
    worker.join()
    assert ended.code == 5
    assert ended.json["state"] == "STATE_FAILED"
    assert "failed 3/5" in ended.err
    assert "the disk is full" in ended.err


def test_releases_are_listed_and_shown(run: Run, cloud: Cloud, student: str) -> None:
    add_release(cloud, 1)
    add_release(cloud, 2, ReleaseState.REJECTED)
    names = [release["name"] for release in run("release", "list", "faq", "-o", "json").json]
    assert names == ["students/faq/releases/2", "students/faq/releases/1"]
    assert run("release", "list").out.splitlines()[1].split()[1] == "rejected"
    shown = run("release", "show", "faq/1", "-o", "json").json
    assert shown["variants"][0]["precision"] == "PRECISION_INT8"
    assert run("release", "show", "faq/9").code == 4
    assert run("release", "show", "faq").code == 3


def test_rollouts_are_started_paused_resumed_and_aborted(run: Run, cloud: Cloud, student: str) -> None:
    add_release(cloud, 1)
    enrol(cloud, "kiosk-7")
    gates = ["--phase", "0.5", "--soak", "1m", "--min-answers", "2", "--success-share", "0.9", "--silence-limit", "5m"]
    made = run("rollout", "start", "faq/1", *gates, "-o", "json")
    assert made.code == 0, made.err
    assert [phase["share"] for phase in made.json["phases"]] == [0.5, 1.0]
    assert made.json["phases"][0]["soak"] == "60s"
    name = made.json["name"]
    assert run("rollout", "pause", name).out.splitlines()[1].split()[2] == "paused"
    assert run("rollout", "resume", name).out.splitlines()[1].split()[2] == "running"
    assert run("rollout", "list", "--student", "faq", "-o", "json").json[0]["name"] == name
    shown = run("rollout", "show", name).out
    assert "* 1    50 %      0/1" in shown
    assert "the rest" in shown
    assert run("rollout", "abort", name).code == 1, "nobody has said yes"
    assert run("rollout", "abort", name, "--yes", "-o", "json").json["state"] == "STATE_ABORTED"
    watched = run("rollout", "watch", name)
    assert (watched.code, "aborted" in watched.err) == (5, True)
    assert run("rollout", "start", "faq/1", "--phase", "0.5 soak=soon").code == 3


def test_rounds_are_opened_listed_and_closed(run: Run, cloud: Cloud, student: str) -> None:
    enrol(cloud, "kiosk-7")
    with cloud.registry.transaction() as session:
        session.add(Assignment(agent_id="kiosk-7", student_id="faq", desired_number=1, serving_number=1))
    made = run("round", "open", "faq", "--duration", "1h", "--lookback", "2d", "-o", "json")
    assert made.code == 0, made.err
    name = made.json["name"]
    assert made.json["cohortSize"] == 1
    assert run("round", "list").out.splitlines()[1].split()[:3] == [name, "students/faq", "open"]
    assert run("round", "close", name.removeprefix("rounds/")).out.splitlines()[1].split()[2] == "closed"
    assert run("round", "show", name, "-o", "json").json["state"] == "STATE_CLOSED"
    assert run("round", "show", "none").code == 4


def test_what_was_done_is_in_the_audit_log(run: Run) -> None:
    run("token", "create")
    entry = run("audit", "list", "--actor", "admins/owner", "--limit", "1", "-o", "json").json[0]
    assert (entry["method"], entry["code"]) == ("FleetService/CreateEnrolmentToken", "OK")


def test_a_new_admin_works_at_once_with_its_role_and_no_more(run: Run, run_alone: Run, tmp_path: Path) -> None:
    made = run("admin", "create", "ada", "--role", "viewer", "--lifetime", "1d", "--out", str(tmp_path / "ada"))
    assert made.code == 0, made.err
    path = made.out.strip()
    assert run_alone("--context", path, "agent", "list").code == 0
    refused = run_alone("--context", path, "token", "create")
    assert refused.code == 6
    assert "cure: Ask an owner" in refused.err
    again = run("admin", "create", "ada", "--role", "viewer", "--out", str(tmp_path / "ada"))
    assert again.code == 5, "a context is never overwritten"


def test_an_empty_list_is_an_empty_array_and_a_bare_head(run: Run) -> None:
    assert run("rollout", "list", "-o", "json").json == []
    assert run("rollout", "list").out.splitlines()[0].startswith("NAME")


def test_a_server_that_is_down_is_named_with_its_cure(run_alone: Run, context: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    text = context.read_text()
    context.write_text(f'address = "{address}"\n' + text.split("\n", 1)[1])
    down = run_alone("--context", str(context), "agent", "list")
    assert down.code == 7
    assert address in down.err
    assert "ebbflow cloud serve" in down.err
    assert down.out == ""


def test_the_context_may_come_from_the_environment(
    run_alone: Run, context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EBBFLOW_CONTEXT", str(context))
    assert run_alone("agent", "list").code == 0
