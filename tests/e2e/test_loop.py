"""One student goes round the whole loop: real processes, real certificates, the real `openai` client."""

import contextlib
import json
import os
import random
import signal
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from deploy_world import Cloud, cloud, process, run, wait_for
from tiny_models import TOPICS, corpus_lines, save_moe_teacher

AGENTS = ("kiosk-1", "kiosk-2")
SHAPE = (
    *("--hidden-size", "64", "--intermediate-size", "128", "--num-hidden-layers", "2"),
    *("--num-attention-heads", "2", "--num-key-value-heads", "1", "--max-position-embeddings", "128"),
)
RECIPE = ("--batch-size", "8", "--sequence-length", "32", "--learning-rate", "3e-3")
PATIENCE_S = 240.0


@dataclass
class Device:
    """A running agent."""

    state: Path
    bin: Path

    @property
    def api(self) -> openai.OpenAI:
        """The real client, as an application on the device uses it."""
        endpoints = tomllib.loads((self.state / "endpoints.toml").read_text())
        return openai.OpenAI(base_url=endpoints["http"], api_key="none", max_retries=0)

    def status(self) -> dict[str, Any]:
        """What `ebbflow-edge status` says."""
        done = run([self.bin / "ebbflow-edge", "status", "--state", self.state, "-o", "json"], check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@dataclass
class World:
    """A cloud with worker and gate, and two agents."""

    folder: Path
    cloud: Cloud
    devices: tuple[Device, ...]


@contextlib.contextmanager
def running_agent(place: Path, cloud: Cloud, name: str, token: str) -> Iterator[Device]:
    state = place / name
    enrol = [cloud.bin / "ebbflow-edge", "enrol", "--state", state, "--cloud", cloud.enrolment, "--name", name]
    enrol.append("--new-device")
    run(enrol, {"EBBFLOW_EDGE_TOKEN": token}, check=True)
    given = {"EBBFLOW_EDGE_HTTP_LISTEN": "127.0.0.1:0", "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0"}
    with process([cloud.bin / "ebbflow-edge", "run", "--state", state], given, place / f"{name}.log"):
        wait_for(f"{name}'s start", (state / "endpoints.toml").exists)
        yield Device(state, cloud.bin)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("loop")
    save_moe_teacher(folder / "teacher")
    (folder / "corpus.jsonl").write_bytes(b"".join(corpus_lines()))
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(cloud(folder, alone=False, settings={"EBBFLOW_LEASE_S": "4"}))
        token = running.token(uses=len(AGENTS))
        devices = tuple(stack.enter_context(running_agent(folder, running, name, token)) for name in AGENTS)
        yield World(folder, running, devices)


def distil(world: World, *options: str, steps: int = 20) -> dict[str, Any]:
    """Runs one distillation to its published release."""
    job = world.cloud.admin("distillation", "start", "faq", "--steps", str(steps), *RECIPE, *options, "--wait")
    number = job["release"].rpartition("/")[2]

    def published() -> dict[str, Any] | None:
        release: dict[str, Any] = world.cloud.admin("release", "show", f"faq/{number}")
        assert release["state"] != "STATE_REJECTED", release
        return release if release["state"] == "STATE_PUBLISHED" else None

    return wait_for("publication", published, PATIENCE_S)


def roll_out(world: World, number: int) -> None:
    done = world.cloud.admin("rollout", "start", f"faq/{number}", "--soak", "0s", "--wait")
    assert done["state"] == "STATE_SUCCEEDED", done
    for device in world.devices:
        assert device.status()["models"][0]["release"] == f"students/faq/releases/{number}"


def ask(device: Device, prompt: str, user: str, outcome: str) -> None:
    api = device.api
    answer = api.completions.create(model="faq", prompt=prompt, max_tokens=4, user=user)
    assert answer.model.startswith("students/faq/releases/")
    api.post("/feedback", body={"id": answer.id, "outcome": outcome}, cast_to=object)


def test_a_student_goes_round_the_loop(world: World) -> None:
    teacher, corpus = str(world.folder / "teacher"), str(world.folder / "corpus.jsonl")
    student = world.cloud.admin("student", "create", "faq", "--teacher", teacher, "--corpus", corpus, *SHAPE)
    assert sorted(student["topics"]) == sorted(TOPICS)

    first = distil(world)
    assert {variant["precision"] for variant in first["variants"]} == {
        "PRECISION_BF16",
        "PRECISION_INT8",
        "PRECISION_INT4",
    }
    roll_out(world, 1)

    for device in world.devices:
        for user in range(20):
            prompt = " and ".join(random.Random(user).choices(TOPICS["sea"], k=3))
            ask(device, prompt, f"user-{user}", "rejected" if user % 2 else "accepted")

    opened = world.cloud.admin("round", "open", "faq")
    name = opened["name"].rpartition("/")[2]
    wait_for("batches", lambda: world.cloud.admin("round", "show", name)["batchesAccepted"] == len(AGENTS), PATIENCE_S)
    closed = world.cloud.admin("round", "close", name)
    weights = {bin_["binId"]: bin_["weight"] for bin_ in closed["aggregate"]["bins"]}
    assert closed["aggregate"]["informative"] is True
    assert max(weights, key=lambda topic: weights[topic]) == "sea"

    second = distil(world, "--base-release", "faq/1", "--round", name)
    assert second["card"]["feedbackEpsilon"] == pytest.approx(4.0)
    roll_out(world, 2)
    assert world.cloud.admin("rollout", "list")[0]["counts"]["succeeded"] == len(AGENTS)

    submissions = [e for e in world.cloud.admin("audit", "list") if e["method"] == "FeedbackService/SubmitBatch"]
    assert {(entry["actor"], entry["resource"], entry["code"]) for entry in submissions} == {
        (f"agents/{agent}", f"rounds/{name}", "OK") for agent in AGENTS
    }
    accounts = world.cloud.admin("privacy", "show")
    assert {account["agent"] for account in accounts} == {f"agents/{agent}" for agent in AGENTS}
    assert all(0 < account["epsilonSpent"] < 2 for account in accounts)


def test_nothing_of_a_request_is_found_in_the_cloud(world: World) -> None:
    secret = "Zwetschgenknödel"
    ask(world.devices[0], f"the tide brings {secret}", "user-secret", "rejected")
    world.devices[0].api.completions.create(model="faq", prompt=secret, max_tokens=2, user=secret)
    home = world.cloud.context.parent.parent
    for path in [*home.rglob("*"), *world.folder.glob("*.log")]:
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert b"user-secret" not in content, path


def test_a_worker_that_is_killed_is_replaced_and_the_job_ends(world: World) -> None:
    job = world.cloud.admin("distillation", "start", "faq", "--steps", "600", *RECIPE, "--base-release", "faq/1")
    name = job["name"].rpartition("/")[2]

    def look() -> dict[str, Any]:
        answer: dict[str, Any] = world.cloud.admin("distillation", "show", name)
        return answer

    wait_for("a step", lambda: look()["step"] > 0)
    for worker in children_of(world, "work"):
        os.kill(worker.pid, signal.SIGKILL)
    done = wait_for("the end", lambda: (state := look())["state"] == "STATE_SUCCEEDED" and state, PATIENCE_S)
    assert done["attempt"] == 2


def children_of(world: World, process_name: str) -> list[psutil.Process]:
    home = str(world.cloud.context.parent.parent)
    found = [
        p for p in psutil.Process().children(recursive=True) if home in (line := p.cmdline()) and process_name in line
    ]
    assert found
    return found


def test_a_device_without_its_cloud_goes_on_answering(world: World) -> None:
    for child in children_of(world, "serve"):
        child.suspend()
        try:
            ask(world.devices[0], "the wind turns", "user-offline", "accepted")
        finally:
            child.resume()
