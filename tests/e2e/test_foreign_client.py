"""Anybody's gRPC tools can look at a running cloud and agent, with the right certificate and no code of ours."""

import contextlib
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google.protobuf
import grpc
import grpc_reflection
import pytest
import typing_extensions
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("foreign_client.py")
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
STUDENTS = "ebbflow.api.v1.StudentService/ListStudents"
START_LIMIT_S = 90.0

Answer = dict[str, Any]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gRPC and its reflection client, protobuf, and nothing else."""
    folder = tmp_path_factory.mktemp("libraries")
    protobuf = Path(google.protobuf.__path__[0])
    (folder / "google").mkdir()
    for path in (protobuf, protobuf.with_name("_upb")):
        (folder / "google" / path.name).symlink_to(path)
    for module in (grpc, grpc_reflection, typing_extensions):
        path = Path(str(module.__file__))
        path = path.parent if path.name == "__init__.py" else path
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running cloud."""
    folder = tmp_path_factory.mktemp("cloud") / "home"
    ebbflow("cloud", "init", "--home", folder)
    with process(
        folder.with_name("serve.log"),
        *("ebbflow.cli.main", "cloud", "serve", "--home", folder, "--alone"),
        *("--listen", "127.0.0.1:0", "--enrol-listen", "127.0.0.1:0"),
    ) as running:
        until_there(folder / "endpoints.toml", running)
        yield folder


@pytest.fixture(scope="module")
def state(home: Path) -> Iterator[Path]:
    """The state folder of a running agent of that cloud."""
    folder = home.with_name("agent")
    token = ebbflow("token", "create", EBBFLOW_CONTEXT=str(home / "admin" / "context.toml"))
    enrolment = tomllib.loads((home / "endpoints.toml").read_text())["enrolment"]
    run("ebbflow.edge.main", "enrol", "--state", folder, "--cloud", enrolment, "--name", "kiosk-1", "--token", token)
    free = {f"EBBFLOW_EDGE_{kind}_LISTEN": "127.0.0.1:0" for kind in ("HTTP", "GRPC")}
    with process(home.with_name("agent.log"), "ebbflow.edge.main", "run", "--state", folder, **free) as running:
        until_there(folder / "endpoints.toml", running)
        yield folder


def environment(more: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("cloud", "edge", "common"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def words(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", f"from {module} import main; main()", *map(str, arguments)]


def run(module: str, *arguments: object, **more: str) -> str:
    done = subprocess.run(words(module, *arguments), env=environment(more), check=True, capture_output=True, text=True)
    return done.stdout.strip()


def ebbflow(*arguments: object, **more: str) -> str:
    return run("ebbflow.cli.main", *arguments, **more)


@contextlib.contextmanager
def process(log: Path, module: str, *arguments: object, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process of ours for as long as the block runs; its end must be an orderly one."""
    command = words(module, *arguments)
    with log.open("wb") as out, subprocess.Popen(command, env=environment(more), stdout=out, stderr=out) as running:
        try:
            yield running
        finally:
            running.send_signal(signal.SIGTERM)
            code = running.wait(60)
    assert code == 0, log.read_text()


def until_there(path: Path, running: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + START_LIMIT_S
    while not path.exists():
        assert running.poll() is None, "it ended at once"
        assert time.monotonic() < limit, f"{path} never came"
        time.sleep(0.05)


@pytest.fixture
def ask(libraries: Path) -> Any:
    """Runs the foreign client."""

    def run_client(target: str, **question: object) -> Answer:
        said = json.dumps({"target": target, **question}, default=str)
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(CLIENT), str(libraries), said],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": os.environ["PATH"]},
            timeout=60,
        )
        answer: Answer = json.loads(done.stdout)
        return answer

    return run_client


def main_of(home: Path) -> str:
    return str(tomllib.loads((home / "endpoints.toml").read_text())["main"])


def admin_of(home: Path) -> dict[str, Path]:
    folder = home / "admin"
    return {"authority": folder / "authority.pem", "certificate": folder / "admin.pem", "key": folder / "admin.key.pem"}


def agent_of(home: Path, state: Path) -> dict[str, Path]:
    found = {path.name: path for path in (state / "identity").rglob("*.pem")}
    return {**admin_of(home), "certificate": found["certificate.pem"], "key": found["key.pem"]}


def test_an_admins_certificate_lists_and_calls_every_service_of_the_cloud(home: Path, ask: Any) -> None:
    calls = [(STUDENTS, {}), ("ebbflow.api.v1.FleetService/ListAgents", {"page_size": 5}), (f"{HEALTH}/Check", {})]
    answer = ask(main_of(home), **admin_of(home), calls=calls)
    ours = {name for name in answer["services"] if name.startswith("ebbflow.api.v1.")}
    assert {"ebbflow.api.v1.StudentService", "ebbflow.api.v1.AgentService", "ebbflow.api.v1.RolloutService"} <= ours
    assert {HEALTH, REFLECTION} <= set(answer["services"])
    students, agents, health = (found["messages"][0] for found in answer["calls"])
    assert students == {}
    assert set(agents) <= {"agents", "next_page_token"}
    assert health == {"status": "SERVING"}


def test_the_enrolment_listener_is_open_to_those_without_a_certificate_and_offers_enrolment_alone(
    home: Path, ask: Any
) -> None:
    enrolment = tomllib.loads((home / "endpoints.toml").read_text())["enrolment"]
    answer = ask(enrolment, authority=admin_of(home)["authority"], calls=[(f"{HEALTH}/Check", {})])
    assert answer["services"] == ["ebbflow.api.v1.EnrolmentService", HEALTH, REFLECTION]
    assert answer["calls"][0]["messages"] == [{"status": "SERVING"}]


def test_without_a_certificate_the_cloud_says_nothing(home: Path, ask: Any) -> None:
    answer = ask(main_of(home), authority=admin_of(home)["authority"])
    assert answer["refused"] == "UNAVAILABLE"
    assert set(answer) == {"refused", "details"}


def test_a_certificate_of_somebody_else_is_refused(home: Path, ask: Any, tmp_path: Path) -> None:
    stranger = self_signed(tmp_path, "spiffe://ebbflow/admins/owner/owner")
    assert ask(main_of(home), **{**admin_of(home), **stranger})["refused"] == "UNAVAILABLE"


def test_a_client_that_expects_another_authority_does_not_speak_with_this_cloud(
    home: Path, ask: Any, tmp_path: Path
) -> None:
    other = self_signed(tmp_path, "spiffe://ebbflow/admins/owner/owner")["certificate"]
    assert ask(main_of(home), **{**admin_of(home), "authority": other})["refused"] == "UNAVAILABLE"


def test_an_agents_certificate_opens_no_admin_service(home: Path, state: Path, ask: Any) -> None:
    answer = ask(main_of(home), **agent_of(home, state), calls=[(STUDENTS, {})])
    assert answer["refused"] == "PERMISSION_DENIED"


def test_tools_that_try_a_newer_reflection_first_are_told_that_it_is_not_there(home: Path, ask: Any) -> None:
    """grpcurl asks for v1 and falls back to v1alpha on UNIMPLEMENTED alone."""
    newer = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    assert ask(main_of(home), **admin_of(home), raw=newer)["refused"] == "UNIMPLEMENTED"


def test_an_agent_can_be_asked_what_it_serves(state: Path, ask: Any) -> None:
    target = tomllib.loads((state / "endpoints.toml").read_text())["grpc"]
    limit = time.monotonic() + START_LIMIT_S
    while True:
        answer = ask(target, calls=[("ebbflow.api.v1.InferenceService/GetModelStatus", {}), (f"{HEALTH}/Check", {})])
        status, health = (found["messages"][0] for found in answer["calls"])
        if status.get("connected"):
            break
        assert time.monotonic() < limit, status
    assert answer["services"] == ["ebbflow.api.v1.InferenceService", HEALTH, REFLECTION]
    assert set(status) == {"connected"}
    assert health["status"] in {"SERVING", "NOT_SERVING"}


def test_an_agent_without_a_release_says_so_by_name(state: Path, ask: Any) -> None:
    target = tomllib.loads((state / "endpoints.toml").read_text())["grpc"]
    answer = ask(target, calls=[("ebbflow.api.v1.InferenceService/Generate", {"prompt": "Hello"})])
    assert answer["refused"] == "UNAVAILABLE"
    assert "release" in answer["details"]


def self_signed(folder: Path, uri: str) -> dict[str, Path]:
    """Writes a certificate with the owner's name that this cloud never signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stranger")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "stranger.pem").write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (folder / "stranger.key.pem").write_bytes(private)
    return {"certificate": folder / "stranger.pem", "key": folder / "stranger.key.pem"}
