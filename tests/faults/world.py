"""A cloud of three processes, agents, and the wire between them; the tests pull the levers of operator and fate."""

import contextlib
import random
import socket
import tomllib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny_models
from deploy_world import free_port
from faults.machine import Machine, Zygote, until
from faults.observer import Observer
from faults.proxy import Wire
from faults.releases import Answers, Files, Maker, ask, insert

from ebbflow.api.v1 import distillation_pb2, fleet_pb2, release_pb2, rollout_pb2, student_pb2
from ebbflow.client.admin import AdminClient
from ebbflow.client.context import AdminContext
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.registry.engine import Registry

STUDENT, DISTILLED, PACKED = "faq", "distilled", "packed"
"""The student that agents serve, one that is only distilled, and one whose releases are only published."""
PROCESSES = ("serve", "work", "gate")
PHASES = (rollout_pb2.Phase(share=0.34), rollout_pb2.Phase())
SUCCEEDED = rollout_pb2.Rollout.STATE_SUCCEEDED


@dataclass
class Device:
    """One agent and its machine."""

    machine: Machine
    state: Path

    @property
    def name(self) -> str:
        """Its name, such as "agents/kiosk-1"."""
        return f"agents/{self.machine.name}"

    def start(self) -> None:
        """Starts the agent; does not wait."""
        listen = {"EBBFLOW_EDGE_HTTP_LISTEN": "127.0.0.1:0", "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0"}
        given = listen | {"EBBFLOW_EDGE_CORES": "1", "EBBFLOW_EDGE_GRACE_S": "2"}
        self.machine.start("agent", ["ebbflow-edge", "run", "--state", self.state], given)

    @property
    def address(self) -> str:
        """host:port of its HTTP server, empty until it has started."""
        with contextlib.suppress(OSError, tomllib.TOMLDecodeError, KeyError):
            published = tomllib.loads((self.state / "endpoints.toml").read_text())
            if published["pid"] == self.machine.pids.get("agent"):
                return str(published["http"]).removeprefix("http://").removesuffix("/v1")
        return ""

    def alive(self) -> bool:
        """Whether it has started; fails if it has ended."""
        status = self.machine.ended("agent")
        assert status is None, f"{self.name} ended with {status}:\n{self.machine.tail('agent')}"
        return bool(self.address)

    def answer(self) -> tuple[int, Answers]:
        """What it answers now."""
        return ask(self.address, STUDENT)


class World:
    """Everything that runs."""

    def __init__(self, folder: Path, seed: int, agents: int = 3, layers: int = 3) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.zygote = Zygote(folder)
        self.cloud = Machine(self.zygote, folder, "cloud")
        self.home = self.cloud.disk / "home"
        self._ports = [free_port(), free_port()]
        self.wire = Wire(("127.0.0.1", self._ports[0]))
        self.devices = [self._device(f"kiosk-{number}") for number in range(1, agents + 1)]
        self.maker = Maker(folder, layers)
        self.files: dict[int, Files] = {}
        self.answers: dict[int, Answers] = {}
        self.install_operations = self.rollout_operations = 0
        """File operations of an agent and of the cloud during the last rollout without disturbance."""

    def _device(self, name: str) -> Device:
        machine = Machine(self.zygote, self.folder, name)
        return Device(machine, machine.disk / "state")

    def open(self, releases: int) -> None:
        """Makes the cloud, its students, its releases and its agents, and brings every release to every agent once."""
        self.cloud.run(["ebbflow", "cloud", "init", "--home", self.home])
        self.blobs = LocalBlobStore(self.home / "blobs")
        self.start_cloud()
        with self.client() as client:
            self._make_students(client)
            self.observer = Observer(self.folder / "observer", client)
            token = fleet_pb2.CreateEnrolmentTokenRequest(uses=len(self.devices), request_id=str(uuid.uuid4()))
            secret = client.fleet.CreateEnrolmentToken(token).secret
        for device in self.devices:
            self._enrol(device, secret)
        for number in range(1, releases + 1):
            self.files[number] = self.maker.make(self.blobs, STUDENT, number)
            self.insert(STUDENT, number, self.files[number])
        until("publication", lambda: self.published(STUDENT) >= set(range(1, releases + 1)))
        for device in self.devices:
            device.start()
        for number in range(1, releases + 1):
            self._learn(number)
        assert len(set(self.answers.values())) == releases, "two releases answer alike"
        for machine in self.machines:
            machine.settle()

    @property
    def machines(self) -> list[Machine]:
        """Cloud and devices."""
        return [self.cloud, *(device.machine for device in self.devices)]

    def close(self) -> None:
        """Ends everything."""
        self.wire.close()
        self.zygote.close()

    def insert(self, student_id: str, number: int, files: Files) -> None:
        """Leaves a packed release for the signers; no connection stays that would outlive a power cut."""
        registry = Registry.open(f"sqlite:///{self.home / 'registry.db'}")
        try:
            insert(registry, student_id, number, files)
        finally:
            registry.close()

    def start_cloud(self, *, wait: bool = True) -> None:
        """Starts the processes of the cloud that do not run, and waits for the listener."""
        for process in PROCESSES:
            if process not in self.cloud.pids:
                options = ["--alone"] if process == "serve" else []
                command = ["ebbflow", "cloud", process, "--home", self.home, *options]
                self.cloud.start(process, command, self._settings())
        if wait:
            until("the listener", self._listens)

    def _settings(self) -> dict[str, str]:
        main, enrolment = self._ports
        settings = {
            "listen": f"127.0.0.1:{main}",
            "enrol_listen": f"127.0.0.1:{enrolment}",
            "advertise": f"127.0.0.1:{self.wire.port}",
            "heartbeat_interval_s": 1,
            "poll_interval_s": 2,
            "hint_spread_ms": 20,
            "tick_interval_s": 0.1,
            "lease_s": 1.5,
            "checkpoint_interval_s": 0.1,
            "threads": 1,
            "gate_max_regression": 1000,
            "gate_max_precision_loss": 1000,
        }
        return {f"EBBFLOW_{name.upper()}": str(value) for name, value in settings.items()}

    def _listens(self) -> bool:
        if "serve" in self.cloud.pids:
            status = self.cloud.ended("serve")
            assert status is None, f"the cloud ended with {status}:\n{self.cloud.tail('serve')}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._ports[0]), 1):
            return True
        return False

    @contextlib.contextmanager
    def client(self) -> Iterator[AdminClient]:
        """The owner's client on a line of its own."""
        endpoint = AdminContext.load(self.home / "admin" / "context.toml").endpoint()
        with AdminClient(replace(endpoint, address=f"127.0.0.1:{self._ports[0]}")) as client:
            yield client

    def _make_students(self, client: AdminClient) -> None:
        tiny_models.save_llama_teacher(self.folder / "teacher")
        (self.folder / "corpus.jsonl").write_bytes(b"".join(tiny_models.corpus_lines()))
        corpus = client.upload(self.folder / "corpus.jsonl").sha256
        shape = student_pb2.Architecture(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
        )
        for student_id, selector in ((STUDENT, ""), (DISTILLED, "role=none"), (PACKED, "role=none")):
            student = student_pb2.Student(
                teacher=str(self.folder / "teacher"), corpus_sha256=corpus, architecture=shape, selector=selector
            )
            request = student_pb2.CreateStudentRequest(student_id=student_id, student=student)
            client.students.CreateStudent(request)

    def _enrol(self, device: Device, secret: str) -> None:
        given = {"EBBFLOW_EDGE_TOKEN": secret, "EBBFLOW_EDGE_CLOUD": f"127.0.0.1:{self._ports[1]}"}
        given["EBBFLOW_EDGE_NEW_DEVICE"] = "1"
        device.machine.run(["ebbflow-edge", "enrol", "--state", device.state, "--name", device.machine.name], given)

    def _learn(self, number: int) -> None:
        """Brings a release to every agent without disturbance, and learns what it answers."""
        before = [machine["operations"] for machine in self.machines]
        self.roll_out(number)
        until(f"release {number}", lambda: self.arrived(number))
        cloud, *agents = (machine["operations"] - begin for machine, begin in zip(self.machines, before, strict=True))
        self.rollout_operations, self.install_operations = cloud, max(agents)
        answers = {device.answer() for device in self.devices}
        assert len(answers) == 1, f"agents disagree on release {number}: {answers}"
        self.answers[number] = answers.pop()[1]

    def published(self, student_id: str) -> set[int]:
        """Numbers of the published releases."""
        with self.client() as client:
            request = release_pb2.ListReleasesRequest(parent=f"students/{student_id}", page_size=1000)
            releases = client.releases.ListReleases(request).releases
        state = release_pb2.Release.STATE_PUBLISHED
        return {int(release.name.rpartition("/")[2]) for release in releases if release.state == state}

    def roll_out(self, number: int, phases: Sequence[rollout_pb2.Phase] = PHASES) -> str:
        """Starts a rollout; returns its name."""
        rollout = rollout_pb2.Rollout(release=f"students/{STUDENT}/releases/{number}", phases=phases)
        request = rollout_pb2.CreateRolloutRequest(rollout=rollout, request_id=str(uuid.uuid4()))
        with self.client() as client:
            self.rollout: str = client.rollouts.CreateRollout(request).rollout.name
        return self.rollout

    def arrived(self, number: int) -> bool:
        """Whether the last rollout has succeeded on every device; fails if it was halted."""
        with self.client() as client:
            found = client.rollouts.GetRollout(rollout_pb2.GetRolloutRequest(name=self.rollout)).rollout
        halted = found.state in {rollout_pb2.Rollout.STATE_HALTED, rollout_pb2.Rollout.STATE_ABORTED}
        assert not halted, f"the rollout of {number} was halted: {found.reason}; {found.failures}"
        return bool(found.state == SUCCEEDED and found.counts.succeeded == len(self.devices))

    def distil(self, **recipe: Any) -> str:
        """Queues a distillation; returns its name."""
        given = {"steps": 30, "batch_size": 4, "sequence_length": 24, "learning_rate": 3e-3, "kl_weight": 0.9, **recipe}
        job = distillation_pb2.Distillation(student=f"students/{DISTILLED}", recipe=distillation_pb2.Recipe(**given))
        request = distillation_pb2.CreateDistillationRequest(distillation=job, request_id=str(uuid.uuid4()))
        with self.client() as client:
            name: str = client.distillations.CreateDistillation(request).distillation.name
        return name

    def job(self, name: str) -> Any:
        """A distillation as it stands."""
        with self.client() as client:
            return client.distillations.GetDistillation(distillation_pb2.GetDistillationRequest(name=name)).distillation
