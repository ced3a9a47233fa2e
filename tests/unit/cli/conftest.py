"""The command line against a real control plane: real listeners, certificates and SQL, on a loop of its own."""

import asyncio
import json
import os
import pty
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prepared_cloud import PreparedCloud

from ebbflow.cli import errors
from ebbflow.cli.main import app
from ebbflow.client.context import write_context
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.identity import admins
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.release import keys, repository
from ebbflow.cloud.services import listeners
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.hub import Hub
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def signing_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority and signing keys, made once."""
    home = tmp_path_factory.mktemp("home")
    Authority.create(home / "authority")
    keys.create(home / "keys")
    return home


@pytest.fixture
def cloud(sqlite_registry: Registry, blobs: LocalBlobStore, signing_home: Path) -> Iterator[Cloud]:
    """A running control plane."""
    with sqlite_registry.transaction() as session:
        repository.initialise(session, signing_home / "keys", now())
    opened = Cloud(
        registry=sqlite_registry,
        blobs=blobs,
        authority=Authority.load(signing_home / "authority"),
        settings=CloudSettings.load(signing_home, listen="127.0.0.1:0", enrol_listen="127.0.0.1:0"),
        plan_signer=PlanSigner.load(signing_home / "keys" / "feedback.pem"),
        online_signer=keys.load(signing_home / "keys", "online"),
    )
    ready, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        hub = Hub(opened)
        bound = listeners.build(opened, hub)
        await bound.start()
        ready.set()
        await stop.wait()
        await bound.stop(hub, grace_s=0.2)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(60), "the control plane did not start"
    yield opened
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    loop.close()
    for pool in (opened.sql, opened.files, opened.uploads):
        pool.shutdown()


@pytest.fixture
def context(cloud: Cloud, tmp_path: Path) -> Path:
    """An owner's context file."""
    return admin_context(cloud, tmp_path / "owner", "owner")


def admin_context(cloud: Cloud, folder: Path, role: str) -> Path:
    """The context file of a new admin."""
    key = generate_key()
    with cloud.registry.transaction() as session:
        issued = admins.create(session, cloud.authority, role, role, make_csr(key), now())
    pems = cloud.authority.certificate_pem, issued.certificate_pem, key_to_pem(key)
    return write_context(folder, cloud.endpoint, *pems)


@pytest.fixture
def viewer_context(cloud: Cloud, tmp_path: Path) -> Path:
    """A viewer's context file."""
    return admin_context(cloud, tmp_path / "viewer", "viewer")


@pytest.fixture
def run_alone(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `ebbflow` as its entry point does."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code: int | str | None = 0
        try:
            errors.run(lambda: app(list(arguments), prog_name="ebbflow"))
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return Outcome(int(code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def run(run_alone: Callable[..., Outcome], context: Path) -> Callable[..., Outcome]:
    """Runs `ebbflow` as the owner."""
    return lambda *arguments: run_alone("--context", str(context), *arguments)


@pytest.fixture
def prepared(tmp_path: Path) -> Iterator[PreparedCloud]:
    """A control plane that answers what the test prepares."""
    with PreparedCloud(Authority.create(tmp_path / "authority")) as answering:
        yield answering


@pytest.fixture
def ask(run_alone: Callable[..., Outcome], prepared: PreparedCloud, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs `ebbflow` against the prepared control plane."""
    authority, key = Authority.load(tmp_path / "authority"), generate_key()
    issued = authority.issue_admin(make_csr(key), "ada", "owner")
    pems = authority.certificate_pem, issued.certificate_pem, key_to_pem(key)
    path = write_context(tmp_path / "ada", prepared.address, *pems)
    return lambda *arguments: run_alone("--context", str(path), *arguments)


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    """Calls something whose standard error is a terminal without colours, and returns what that showed."""

    def call(act: Callable[[], object]) -> str:
        master, slave = pty.openpty()
        written: list[bytes] = []

        def drain() -> None:
            try:
                while data := os.read(master, 65_536):
                    written.append(data)
            except OSError:  # the other end is closed
                return

        thread = threading.Thread(target=drain)
        thread.start()
        for name, value in {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "100", "LINES": "40"}.items():
            monkeypatch.setenv(name, value)
        with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", terminal)
            act()
        thread.join(60)
        os.close(master)
        return b"".join(written).decode()

    return call


SHAPE = """
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
vocabulary_size = 512
max_position_embeddings = 128
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    texts = [{"topic": topic, "text": f"About {topic}.", "split": "train"} for topic in ("datetime", "json")]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


@pytest.fixture
def student(run: Callable[..., Outcome], corpus: Path, tmp_path: Path) -> str:
    (tmp_path / "shape.toml").write_text(SHAPE)
    arguments = [
        "--teacher",
        "/models/teacher",
        "--corpus",
        str(corpus),
        "--architecture",
        str(tmp_path / "shape.toml"),
    ]
    made = run("student", "create", "faq", *arguments, "--epsilon", "2", "--rounds-per-window", "2", "-o", "json")
    assert made.code == 0, made.err
    assert made.json["architecture"]["hiddenSize"] == 64
    assert made.json["privacyPolicy"]["epsilon"] == 2
    assert made.json["topics"] == ["datetime", "json"]
    return "students/faq"
