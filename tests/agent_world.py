"""A real cloud in this process, with real releases, for agents to live with."""

import asyncio
import contextlib
import datetime as dt
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import tiny_students
from google.protobuf.json_format import MessageToDict

from ebbflow.api.v1.feedback_pb2 import Bin, PrivacyPolicy, RoundPlan
from ebbflow.cloud.feedback import rounds
from ebbflow.cloud.identity import certificates, tokens
from ebbflow.cloud.processes import init
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry.changes import bump
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    Distillation,
    DistillationState,
    FeedbackBatch,
    Release,
    ReleaseState,
    Student,
)
from ebbflow.cloud.release import keys, publish
from ebbflow.cloud.services import listeners
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.hub import Hub
from ebbflow.common.codes.artefact import Precision
from ebbflow.common.privacy.calibration import complete_policy
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import path_of, variant_path
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.engine.loss import sequence_loss

PROBE = Probe(((1, 70, 80, 90, 100), (1, 75, 85)), 0.01)


class CloudWorld:
    """Registry, blobs, authority, signing keys and both listeners; the tests pull the levers of the operator."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        fast = {"heartbeat_interval_s": 1, "poll_interval_s": 2, "hint_spread_ms": 50, "agent_certificate_days": 1.0}
        self.settings = CloudSettings.load(
            folder / "cloud", listen="127.0.0.1:0", enrol_listen="127.0.0.1:0", **{**fast, **settings}
        )
        init.initialise(self.settings)
        self.tokenizer = tiny_students.train_tokenizer()
        self.signers = {name: keys.load(self.settings.paths.keys, name) for name in ("distiller", "gate", "online")}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the listeners; the same ports again when it was stopped."""
        self.cloud = Cloud.open(self.settings)
        self.hub = Hub(self.cloud)
        bound = listeners.build(self.cloud, self.hub)
        await bound.start()
        self.main, self.enrolment = bound.main_address, bound.enrolment_address
        addresses = {"listen": self.main, "enrol_listen": self.enrolment}
        self.settings = self.settings.model_copy(update=addresses)
        beat = asyncio.create_task(self.hub.run(0.05))
        try:
            yield
        finally:
            await bound.stop(self.hub, grace_s=0.5)
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
            self.cloud.close()

    def token(self, **arguments: Any) -> str:
        """A token for one device."""
        with self.cloud.registry.transaction() as session:
            return tokens.create(session, self.cloud.authority.sha256, now(), **arguments)[1].encode()

    def student(self, student_id: str = "faq", *, allow_adapters: bool = False, window_days: int = 0) -> None:
        """Makes a student whose bins are two topics."""
        corpus = self.cloud.blobs.put([json.dumps({"topic": "files", "text": "open a file"}).encode() + b"\n"])
        policy = complete_policy(PrivacyPolicy(allow_adapters=allow_adapters, window_days=window_days))
        with self.cloud.registry.transaction() as session:
            session.add(
                Student(
                    id=student_id,
                    teacher="",
                    architecture={},
                    corpus_sha256=corpus.sha256,
                    topics=["files", "greetings"],
                    privacy_policy=MessageToDict(policy),
                    selector="",
                    create_time=now(),
                )
            )

    def publish(
        self,
        number: int,
        student_id: str = "faq",
        *,
        probe_loss: float | None = None,
        layers: int = 1,
        precisions: Sequence[Precision] = ("int8",),
    ) -> None:
        """Packs, signs and publishes a release; a wrong `probe_loss` makes it one that devices refuse."""
        targets = self._pack(number, student_id, probe_loss, layers, precisions)
        with self.cloud.registry.transaction() as session:
            session.add(_distillation(number, student_id))
            session.flush()
            session.add(_release(number, student_id, targets))
            session.flush()
            proposal = publish.propose(session, self.signers["distiller"], now())
            assert proposal
            publish.approve(session, self.signers["gate"], proposal, now=now())
            assert publish.publish(session, self.signers["online"], now())

    def _pack(
        self, number: int, student_id: str, probe_loss: float | None, layers: int, precisions: Sequence[Precision]
    ) -> dict[str, Any]:
        files = {"tokenizer": self.tokenizer.to_bytes()}
        variants: dict[str, ManifestVariant] = {}
        for precision in precisions:
            weights = self.folder / f"{student_id}-{number}.{precision}.safetensors"
            tiny_students.write_student(weights, self.tokenizer, number, precision, layers=layers)
            loss = _probe_loss(weights) if probe_loss is None else probe_loss
            files[precision] = weights.read_bytes()
            path = variant_path(student_id, number, precision)
            variants[precision] = ManifestVariant(path, weights.stat().st_size, loss)
        config = tiny_students.config_of(self.tokenizer, layers).to_hf()
        files["manifest"] = Manifest(student_id, number, config, variants, PROBE).to_json()
        blobs = {kind: self.cloud.blobs.put([data]) for kind, data in files.items()}
        return {
            path_of(student_id, number, kind): {"sha256": blob.sha256, "size_bytes": blob.size_bytes, "kind": kind}
            for kind, blob in blobs.items()
        }

    def assign(self, agent: str, number: int | None, student_id: str = "faq") -> None:
        """Makes a release the desired one of an agent; None takes the student away."""
        agent_id = agent.removeprefix("agents/")
        with self.cloud.registry.transaction() as session:
            row = session.get(Assignment, (agent_id, student_id))
            if row is None:
                session.add(row := Assignment(agent_id=agent_id, student_id=student_id))
            row.desired_number, row.update_time = number, now()
            bump(session, "desired_state")

    def assignment(self, agent: str, student_id: str = "faq") -> Assignment:
        """What the cloud knows of an agent's release."""
        with self.cloud.registry.reading() as session:
            return session.get_one(Assignment, (agent.removeprefix("agents/"), student_id))

    def shut_out(self, agent: str, state: AgentState) -> None:
        """Revokes or quarantines an agent."""
        with self.cloud.registry.transaction() as session:
            session.get_one(Agent, agent.removeprefix("agents/")).state = state
            if state is AgentState.REVOKED:
                certificates.revoke_subject(session, agent, now())
            bump(session, "desired_state")

    def open_round(
        self,
        student_id: str = "faq",
        duration: dt.timedelta = dt.timedelta(hours=1),
        texts: int = 1,
        measure: "RoundPlan.Measure.ValueType" = RoundPlan.MEASURE_UNSPECIFIED,
    ) -> str:
        """Opens a round over two bins; returns its id."""
        topics = {"files": "read a file", "greetings": "Grüße"}
        bins = [Bin(bin_id=topic, texts=[text] * texts) for topic, text in topics.items()]
        with self.cloud.registry.transaction() as session:
            student = session.get_one(Student, student_id)
            lookback = dt.timedelta(hours=1)
            signer = self.cloud.plan_signer
            return rounds.open_round(session, student, bins, signer, now(), duration, lookback, measure=measure).id

    def batches(self) -> list[FeedbackBatch]:
        """What the cloud has kept."""
        with self.cloud.registry.reading() as session:
            return list(session.query(FeedbackBatch))

    def device(self, name: str = "device", **settings: Any) -> AgentSettings:
        """Settings of a device with free ports."""
        free = {"http_listen": "127.0.0.1:0", "grpc_listen": "127.0.0.1:0", "cores": 1, "grace_s": 5}
        return AgentSettings(state=self.folder / name, **{**free, **settings})


def _probe_loss(weights: Path) -> float:
    engine = load_engine(weights, threads=1)
    return PROBE.mean([sequence_loss(engine, token_ids) for token_ids in PROBE.token_ids])


def _distillation(number: int, student_id: str) -> Distillation:
    return Distillation(
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


def _release(number: int, student_id: str, targets: dict[str, Any]) -> Release:
    return Release(
        student_id=student_id,
        number=number,
        distillation_id=f"{student_id}-{number}",
        state=ReleaseState.PACKED,
        targets=targets,
        create_time=now(),
    )
