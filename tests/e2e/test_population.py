"""Private evolution with real processes: a generation, a round on it, the next generation, a student that learns it."""

import contextlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import population_world as world
import pytest
from deploy_world import Cloud, cloud, process, run, wait_for

pytestmark = pytest.mark.slow

SHAPE = (
    *("--hidden-size", "64", "--intermediate-size", "128", "--num-hidden-layers", "2"),
    *("--num-attention-heads", "2", "--num-key-value-heads", "1", "--max-position-embeddings", "128"),
)
RECIPE = ("--steps", "20", "--batch-size", "8", "--sequence-length", "32", "--learning-rate", "3e-3")
USERS = 80
PATIENCE_S = 240.0


@contextlib.contextmanager
def agent(folder: Path, running: Cloud) -> Iterator[openai.OpenAI]:
    """An agent and the client that an application on its device uses."""
    state = folder / "kiosk-1"
    enrol = [running.bin / "ebbflow-edge", "enrol", "--state", state, "--cloud", running.enrolment, "--name", "kiosk-1"]
    run([*enrol, "--new-device"], {"EBBFLOW_EDGE_TOKEN": running.token(uses=1)}, check=True)
    given = {"EBBFLOW_EDGE_HTTP_LISTEN": "127.0.0.1:0", "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0"}
    with process([running.bin / "ebbflow-edge", "run", "--state", state], given, folder / "kiosk-1.log"):
        wait_for("the agent's start", (state / "endpoints.toml").exists)
        endpoint = tomllib.loads((state / "endpoints.toml").read_text())["http"]
        yield openai.OpenAI(base_url=endpoint, api_key="none", max_retries=0)


def distil(running: Cloud, *options: str) -> dict[str, Any]:
    job = running.admin("distillation", "start", "faq", *RECIPE, *options, "--wait")
    number = job["release"].rpartition("/")[2]

    def published() -> dict[str, Any] | None:
        release: dict[str, Any] = running.admin("release", "show", f"faq/{number}")
        assert release["state"] != "STATE_REJECTED", release
        return release if release["state"] == "STATE_PUBLISHED" else None

    return wait_for("publication", published, PATIENCE_S)


def evolve(running: Cloud, *options: str) -> dict[str, Any]:
    made = running.admin("population", "evolve", "faq", "--size", "8", *options)

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = running.admin("population", "show", "faq/" + made["name"].rpartition("/")[2])
        assert found["state"] != "STATE_FAILED", found
        return found if found["state"] == "STATE_READY" else None

    return wait_for("a generation", ended, PATIENCE_S)


def test_a_student_learns_from_prompts_that_its_users_chose(tmp_path: Path) -> None:
    everything = [text for topic in world.GRAMMAR for text in world.sentences(topic)]
    public = world.public_texts()
    teacher = world.save_teacher(tmp_path / "teacher", everything, 120)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(world.corpus_bytes(public))
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(cloud(tmp_path, alone=False))
        running.admin("student", "create", "faq", "--teacher", str(teacher), "--corpus", str(corpus), *SHAPE)
        distil(running)
        client = stack.enter_context(agent(tmp_path, running))
        rolled = running.admin("rollout", "start", "faq/1", "--soak", "0s", "--wait")
        assert rolled["state"] == "STATE_SUCCEEDED", rolled

        first = evolve(running)
        assert first["method"] == "METHOD_PUBLIC_TEXTS"
        wanted = max(first["prompts"], key=lambda prompt: prompt["topic"])["text"]
        for user in range(USERS):
            client.completions.create(model="faq", prompt=wanted, max_tokens=2, user=f"user-{user}")

        opened = running.admin("round", "open", "faq", "--population", "1", "--metric", "near")
        name = opened["name"].rpartition("/")[2]
        wait_for("a batch", lambda: running.admin("round", "show", name)["batchesAccepted"] == 1, PATIENCE_S)
        running.admin("round", "close", name)

        second = evolve(running, "--round", name)
        assert second["parents"]["winners"] >= 1
        assert second["parents"]["nearShare"] > 0.5
        [survivor] = [prompt for prompt in second["prompts"] if prompt["text"] == wanted]
        family = [prompt for prompt in second["prompts"] if prompt["parent"] == survivor["parent"]]
        assert sum(prompt["weight"] for prompt in family) > 0.5
        assert second["method"] == "METHOD_TEACHER" or "the teacher varied" in second["reason"]
        assert json.dumps(second).count("user-") == 0

        release = distil(running, "--base-release", "faq/1", "--population", "2", "--population-share", "0.5")
        assert release["card"]["feedbackEpsilon"] == pytest.approx(4.0)
