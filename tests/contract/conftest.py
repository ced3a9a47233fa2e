"""A control plane with real listeners, certificates and keys, on each supported database."""

import asyncio
import contextlib
import datetime as dt
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from feedback_world import AGENTS, Device
from google.protobuf.json_format import MessageToDict

from ebbflow.api.v1.enrolment_pb2_grpc import EnrolmentServiceStub
from ebbflow.api.v1.feedback_pb2 import PrivacyPolicy
from ebbflow.client.channels import channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.identity import admins, certificates, tokens
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    Distillation,
    DistillationState,
    Release,
    ReleaseState,
    Student,
)
from ebbflow.cloud.release import keys, publish, repository
from ebbflow.cloud.rollout import store
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.services import listeners
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.hub import Hub
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr
from ebbflow.common.identity.peers import Identity
from ebbflow.common.privacy.calibration import complete_policy
from ebbflow.common.trust.targets import path_of

CORPUS = b"".join(
    json.dumps({"topic": topic, "text": f"a text about {topic}", "split": split}).encode() + b"\n"
    for topic in ("datetime", "regex", "json")
    for split in ("train", "gate", "bin")
)


@dataclass
class Client:
    """A certificate and the channel that presents it."""

    key: ec.EllipticCurvePrivateKey
    certificate_pem: bytes
    channel: Any


class ControlPlane:
    """Two listeners on free ports, and ways to become somebody."""

    def __init__(self, cloud: Cloud, hub: Hub, bound: listeners.Listeners) -> None:
        self.cloud, self.hub, self.bound = cloud, hub, bound
        self._clients: list[Client] = []

    @property
    def registry(self) -> Registry:
        return self.cloud.registry

    def endpoint(self, certificate_pem: bytes, key: ec.EllipticCurvePrivateKey) -> Endpoint:
        return Endpoint(self.bound.main_address, self.cloud.authority.certificate_pem, certificate_pem, key_to_pem(key))

    def connect(self, certificate_pem: bytes, key: ec.EllipticCurvePrivateKey) -> Client:
        client = Client(key, certificate_pem, channel(self.endpoint(certificate_pem, key)))
        self._clients.append(client)
        return client

    def admin(self, role: str = "owner", admin_id: str = "") -> Client:
        key = generate_key()
        with self.registry.transaction() as session:
            issued = admins.create(session, self.cloud.authority, admin_id or f"{role}-1", role, make_csr(key), now())
        return self.connect(issued.certificate_pem, key)

    def agent(self, agent_id: str, lifetime: dt.timedelta = dt.timedelta(days=1), **fields: Any) -> Client:
        """An enrolled agent, written straight into the registry."""
        key = generate_key()
        with self.registry.transaction() as session:
            if session.get(Agent, agent_id) is None:
                row = {"labels": {}, "profile": {}, "create_time": now(), "new_device": True, **fields}
                session.add(Agent(id=agent_id, state=AgentState.ACTIVE, **row))
            issued = self.cloud.authority.issue_agent(make_csr(key), agent_id, lifetime, now())
            certificates.record(session, issued, now())
        return self.connect(issued.certificate_pem, key)

    def enrolment(self) -> EnrolmentServiceStub:
        plain = Endpoint(self.bound.enrolment_address, self.cloud.authority.certificate_pem)
        client = Client(generate_key(), b"", channel(plain))
        self._clients.append(client)
        stub: EnrolmentServiceStub = EnrolmentServiceStub(client.channel)
        return stub

    def token(self, **arguments: Any) -> str:
        with self.registry.transaction() as session:
            _, secret = tokens.create(session, self.cloud.authority.sha256, now(), **arguments)
        return secret.encode()

    def student(self, student_id: str = "faq", selector: str = "") -> None:
        corpus = self.cloud.blobs.put([CORPUS])
        with self.registry.transaction() as session:
            session.add(
                Student(
                    id=student_id,
                    teacher="/models/teacher",
                    architecture={},
                    corpus_sha256=corpus.sha256,
                    topics=["datetime", "regex", "json"],
                    privacy_policy=MessageToDict(complete_policy(PrivacyPolicy())),
                    selector=selector,
                    create_time=now(),
                )
            )

    def release(
        self,
        number: int = 1,
        student_id: str = "faq",
        content: bytes = b"weights",
        state: ReleaseState = ReleaseState.PUBLISHED,
    ) -> str:
        """A release, whose int8 variant holds `content`; returns the variant's SHA-256."""
        kinds = {"manifest": b"{}", "tokenizer": b"tokens", "int8": content}
        targets = {
            path_of(student_id, number, kind): {
                "sha256": self.cloud.blobs.put([data]).sha256,
                "size_bytes": len(data),
                "kind": kind,
            }
            for kind, data in kinds.items()
        }
        with self.registry.transaction() as session:
            session.add(
                Distillation(
                    id=f"{student_id}-{number}",
                    student_id=student_id,
                    state=DistillationState.SUCCEEDED,
                    recipe={},
                    mixture={},
                    base_release=None,
                    round_id=None,
                    create_time=now(),
                    update_time=now(),
                )
            )
            session.flush()
            session.add(
                Release(
                    student_id=student_id,
                    number=number,
                    distillation_id=f"{student_id}-{number}",
                    state=state,
                    targets=targets,
                    create_time=now(),
                )
            )
        return hashlib.sha256(content).hexdigest()

    def sign(self) -> None:
        """What distiller and gate do with the oldest packed release."""
        home = self.cloud.settings.paths.keys
        with self.registry.transaction() as session:
            proposal = publish.propose(session, keys.load(home, "distiller"), now())
            assert proposal is not None
            publish.approve(session, keys.load(home, "gate"), proposal, now=now())

    def roll_out(self, student_id: str, number: int) -> None:
        """Tells every agent of a student to serve a release."""
        with self.registry.transaction() as session:
            store.create(session, RolloutSpec(student_id=student_id, number=number, phases=(Phase(),)), now())

    def serve(self, agent_id: str, student_id: str, number: int) -> None:
        """What the registry knows of an agent that serves a release."""
        with self.registry.transaction() as session:
            session.get_one(Assignment, (agent_id, student_id)).serving_number = number

    def identity_of(self, client: Client) -> Identity:
        return Identity.from_certificate(client.certificate_pem)

    async def close(self) -> None:
        for client in self._clients:
            await client.channel.close()
        await self.bound.stop(self.hub, grace_s=1.0)


@pytest.fixture(scope="session")
def trust_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority and signing keys, made once."""
    home = tmp_path_factory.mktemp("home")
    Authority.create(home / "authority")
    keys.create(home / "keys")
    return home


@pytest.fixture
async def plane(registry: Registry, blobs: LocalBlobStore, trust_home: Path) -> AsyncIterator[ControlPlane]:
    """A running control plane over each supported database."""
    with registry.transaction() as session:
        repository.initialise(session, trust_home / "keys", now())
    settings = CloudSettings.load(
        trust_home, listen="127.0.0.1:0", enrol_listen="127.0.0.1:0", hosts=["localhost", "127.0.0.1"]
    )
    cloud = Cloud(
        registry=registry,
        blobs=blobs,
        authority=Authority.load(trust_home / "authority"),
        settings=settings,
        plan_signer=PlanSigner.load(trust_home / "keys" / "feedback.pem"),
        online_signer=keys.load(trust_home / "keys", "online"),
    )
    hub = Hub(cloud)
    bound = listeners.build(cloud, hub)
    await bound.start()
    running = asyncio.create_task(hub.run(0.05))
    opened = ControlPlane(cloud, hub, bound)
    yield opened
    await opened.close()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    cloud.sql.shutdown()
    cloud.files.shutdown()
    cloud.uploads.shutdown()


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[Device]]:
    """The feedback side of the three agents that serve the student of `feedback_world`."""
    made = [Device(tmp_path / agent, agent) for agent in AGENTS]
    yield made
    for device in made:
        device.store.close()
