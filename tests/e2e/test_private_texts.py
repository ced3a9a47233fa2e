"""Private texts with real processes: trained on by two workers, in a release that a device serves, and then gone."""

import contextlib
import hashlib
import json
import re
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from deploy_world import Cloud, cloud, process, run, wait_for
from tiny_models import corpus_lines, save_moe_teacher

pytestmark = pytest.mark.slow

SHAPE = (
    *("--hidden-size", "64", "--intermediate-size", "128", "--num-hidden-layers", "2"),
    *("--num-attention-heads", "2", "--num-key-value-heads", "1", "--max-position-embeddings", "128"),
)
RECIPE = ("--batch-size", "8", "--sequence-length", "32", "--learning-rate", "3e-3", "--kl-weight", "0")
PUBLIC_STEPS, PRIVATE_STEPS = 20, 600
SECRET = "zyzzyva"
SETTINGS = {"EBBFLOW_LEASE_S": "4", "EBBFLOW_CHECKPOINT_INTERVAL_S": "0.2", "EBBFLOW_THREADS": "1"}
PATIENCE_S = 240.0


def private_options(texts: Path) -> list[str]:
    every_text_in_every_step = ["--private-batch-size", "40", "--private-corpus-size", "40"]
    return [
        *("--private-corpus", str(texts), "--private-epsilon", "8", "--private-steps", str(PRIVATE_STEPS)),
        *every_text_in_every_step,
        *("--private-rank", "4"),
    ]


@dataclass
class Scene:
    """A control plane and a gate, a student, and private texts on the admin's own disk."""

    folder: Path
    cloud: Cloud
    texts: Path

    @property
    def stored(self) -> Path:
        """Where the blob store has the texts."""
        sha256 = hashlib.sha256(self.texts.read_bytes()).hexdigest()
        return self.folder / "cloud" / "blobs" / sha256[:2] / sha256

    def holding(self) -> list[Path]:
        """The cloud's files and logs that hold what is secret."""
        paths = [*(self.folder / "cloud").rglob("*"), *self.folder.glob("*.log")]
        return [path for path in paths if path.is_file() and SECRET.encode() in path.read_bytes()]

    def told(self, *arguments: str) -> tuple[int, str]:
        """Runs an admin command; returns its exit code and what it says to the person."""
        done = run([self.cloud.bin / "ebbflow", *arguments], {"EBBFLOW_CONTEXT": str(self.cloud.context)})
        return done.returncode, done.stderr

    def process(self, verb: str, log: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        """One of the cloud's processes."""
        return cloud_process(self.cloud, verb, self.folder / log)

    def look(self, name: str) -> dict[str, Any]:
        """A distillation that goes well."""
        found: dict[str, Any] = self.cloud.admin("distillation", "show", name)
        assert found["state"] in {"STATE_QUEUED", "STATE_RUNNING", "STATE_SUCCEEDED"}, found
        return found


def cloud_process(running: Cloud, verb: str, log: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return process([running.bin / "ebbflow", "cloud", verb, "--home", running.context.parent.parent], SETTINGS, log)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    teacher, corpus, texts = tmp_path / "teacher", tmp_path / "corpus.jsonl", tmp_path / "private.jsonl"
    save_moe_teacher(teacher)
    corpus.write_bytes(b"".join(corpus_lines()))
    lines = [{"topic": "secret", "text": f"the {SECRET} number {number} is sold"} for number in range(40)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (
        cloud(tmp_path, alone=True, settings=SETTINGS) as running,
        cloud_process(running, "gate", tmp_path / "gate.log"),
    ):
        running.admin("student", "create", "faq", "--teacher", str(teacher), "--corpus", str(corpus), *SHAPE)
        yield Scene(tmp_path, running, texts)


def kill_in_the_middle(scene: Scene, name: str) -> None:
    """Lets a worker begin with the private part, and kills it."""
    with scene.process("work", "worker-1.log") as worker:
        wait_for("a private step", lambda: scene.look(name)["step"] > PUBLIC_STEPS + 20, PATIENCE_S)
        worker.send_signal(signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL
    left = scene.look(name)
    assert (left["state"], left["attempt"]) == ("STATE_RUNNING", 1)
    assert PUBLIC_STEPS < left["step"] < PUBLIC_STEPS + PRIVATE_STEPS


def finish(scene: Scene, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lets another worker go on to the end; returns the distillation and its published release."""
    with scene.process("work", "worker-2.log"):
        done = wait_for("the end", lambda: (now := scene.look(name))["state"] == "STATE_SUCCEEDED" and now, PATIENCE_S)

        def published() -> dict[str, Any] | None:
            found: dict[str, Any] = scene.cloud.admin("release", "show", short(done["release"]))
            assert found["state"] != "STATE_REJECTED", found
            return found if found["state"] == "STATE_PUBLISHED" else None

        release = wait_for("publication", published, PATIENCE_S)
    assert (done["attempt"], done["step"]) == (2, PUBLIC_STEPS + PRIVATE_STEPS)
    (step,) = re.findall(r"goes on after step (\d+)", (scene.folder / "worker-2.log").read_text())
    assert int(step) > PUBLIC_STEPS, "in the private part, from the killed worker's checkpoint"
    return done, release


def short(release: str) -> str:
    return "faq/" + release.rpartition("/")[2]


def serve(scene: Scene, release: str) -> None:
    """Lets a device serve it."""
    state, bin_ = scene.folder / "kiosk-1", scene.cloud.bin
    enrol = [bin_ / "ebbflow-edge", "enrol", "--state", state, "--cloud", scene.cloud.enrolment, "--name", "kiosk-1"]
    run([*enrol, "--new-device"], {"EBBFLOW_EDGE_TOKEN": scene.cloud.token(uses=1)}, check=True)
    given = {"EBBFLOW_EDGE_HTTP_LISTEN": "127.0.0.1:0", "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0"}
    with process([bin_ / "ebbflow-edge", "run", "--state", state], given, scene.folder / "kiosk-1.log"):
        wait_for("the agent's start", (state / "endpoints.toml").exists)
        rolled = scene.cloud.admin("rollout", "start", short(release), "--soak", "0s", "--wait")
        assert rolled["state"] == "STATE_SUCCEEDED", rolled
        endpoint = tomllib.loads((state / "endpoints.toml").read_text())["http"]
        client = openai.OpenAI(base_url=endpoint, api_key="none", max_retries=0)
        answer = client.completions.create(model="faq", prompt="the tide", max_tokens=4, user="someone")
        assert answer.model == release


def test_private_texts_survive_a_killed_worker_shape_a_release_and_are_gone_when_they_are_deleted(scene: Scene) -> None:
    order = ["distillation", "start", "faq", "--steps", str(PUBLIC_STEPS), *RECIPE, *private_options(scene.texts)]
    name = scene.cloud.admin(*order)["name"].rpartition("/")[2]
    assert scene.holding() == [scene.stored]

    kill_in_the_middle(scene, name)
    code, words = scene.told("distillation", "forget", name)
    assert (code != 0, "still needs these texts" in words) == (True, True)
    done, release = finish(scene, name)
    epsilon = release["card"]["trainingEpsilon"]
    assert 7.8 < epsilon <= 8.0
    assert epsilon == done["privateTraining"]["pldEpsilon"] == done["privateAccount"]["epsilon"]
    serve(scene, release["name"])

    assert scene.holding() == [scene.stored], "neither checkpoints nor logs nor the registry hold any"
    assert scene.told("distillation", "forget", name)[0] == 0
    assert (scene.stored.exists(), scene.holding()) == (False, [])
    assert scene.look(name)["privateCorpusDeleteTime"]

    code, words = scene.told(*order)
    assert (code, "2 distillations learn from these texts" in words) == (0, True)
    assert scene.stored.exists()
    second = scene.cloud.admin("distillation", "list")[0]["name"].rpartition("/")[2]
    assert scene.look(second)["privateAccount"]["epsilon"] == pytest.approx(epsilon + 8.0), "as it was ordered"
    scene.cloud.admin("distillation", "cancel", second)
    assert scene.told("distillation", "forget", "--private-corpus", str(scene.texts))[0] == 0
    assert scene.holding() == []
