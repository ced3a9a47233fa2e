"""A registry with a student and its fleet, and the feedback side of real devices."""

import datetime as dt
from collections.abc import Callable, Collection
from pathlib import Path

import sqlalchemy as sa
from securesystemslib.signer import CryptoSigner
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback import batches, charges, rounds
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment, FeedbackRefusal, Round, RoundState, Student
from ebbflow.common.identity import keys as identity
from ebbflow.common.privacy.calibration import complete_policy
from ebbflow.common.privacy.vector import AdapterContribution, Contribution
from ebbflow.edge.feedback.plans import Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
AGENTS = ("kiosk-1", "kiosk-2", "kiosk-3")
BINS = [pb.Bin(bin_id=topic, texts=[topic]) for topic in ("files", "dates", "networks")]
SIGNER = CryptoSigner.generate_ed25519()
KEYS = {agent: identity.generate_key() for agent in (*AGENTS, "stranger")}


def signed_policy(
    policy: pb.PrivacyPolicy | None = None, student: str = "faq", signer: CryptoSigner = SIGNER, version: int = 1
) -> pb.SignedPolicy:
    """A policy as its owner signed it; zeros take the defaults."""
    document = pb.PolicyDocument(
        student=f"students/{student}", version=version, policy=complete_policy(policy or pb.PrivacyPolicy())
    )
    return PlanSigner(signer).sign_policy(document)


def add_fleet(registry: Registry) -> None:
    """Adds a student that three agents serve, and an agent for each reason not to belong to its cohort."""
    outsiders = {"elsewhere": {"site": "oslo"}, "revoked": {"site": "berlin"}, "empty": {"site": "berlin"}}
    with registry.transaction() as session:
        session.add(
            Student(
                id="faq",
                teacher="",
                architecture={},
                corpus_sha256="0" * 64,
                topics=["files", "dates", "networks"],
                privacy_policy={"epsilon": 4.0},
                selector="site=berlin",
                create_time=NOW,
            )
        )
        for agent in (*AGENTS, *outsiders, "stranger"):
            labels = outsiders.get(agent, {"site": "berlin"})
            state = AgentState.REVOKED if agent == "revoked" else AgentState.ACTIVE
            session.add(Agent(id=agent, state=state, labels=labels, profile={}, create_time=NOW, new_device=True))
        session.flush()
        for agent in (*AGENTS, "elsewhere", "revoked"):
            session.add(Assignment(agent_id=agent, student_id="faq", serving_number=1))
        session.add(Assignment(agent_id="empty", student_id="faq", desired_number=1))


def open_round(registry: Registry, now: dt.datetime = NOW, **more: object) -> Round:
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        return rounds.open_round(session, student, BINS, PlanSigner(SIGNER), now, **more)  # type: ignore[arg-type]


def open_plans(session: Session, now: dt.datetime = NOW) -> list[pb.SignedPlan]:
    """The plans of the open rounds, whoever has answered them."""
    query = sa.select(Round).where(Round.state == RoundState.OPEN, Round.end_time > now).order_by(Round.create_time)
    rows = session.scalars(query.order_by(Round.id))
    return [pb.SignedPlan(plan=row.plan, signature=row.signature, key_id=row.key_id) for row in rows]


def close_all(registry: Registry) -> None:
    rounds.close_overdue(registry, NOW + 2 * DAY)


class Device:
    """A real agent's feedback side."""

    def __init__(self, folder: Path, agent: str) -> None:
        folder.mkdir()
        self.agent, self.key, self.store = agent, KEYS[agent], FeedbackStore(folder / "agent.db")

    def answer(
        self,
        registry: Registry,
        votes: Collection[Contribution] | Collection[AdapterContribution],
        now: dt.datetime = NOW,
    ) -> pb.SignedBatch:
        """Answers the newest open round, as a device does that fetched its plan before it answered."""
        with registry.reading() as session:
            plan = open_plans(session, now)[-1]
        keys = {SIGNER.public_key.keyid: SIGNER.public_key}
        admitted = admit(plan, keys, Ceiling(epsilon=64.0, adapters=True), now)
        data = self.store.release_batch(admitted, votes, lambda data: identity.sign(self.key, data), now)
        return pb.SignedBatch.FromString(data)

    def submit(
        self, registry: Registry, signed: pb.SignedBatch, now: dt.datetime = NOW, blobs: BlobStore | None = None
    ) -> None:
        batches.submit(registry, self.agent, signed, self.key.public_key(), now, blobs)

    def take_over(self, registry: Registry, now: dt.datetime = NOW) -> int:
        """Learns what the cloud knows of its charges; says how many were new."""
        with registry.reading() as session:
            return self.store.take_over(charges.known(session, self.agent), now)

    def resign(self, signed: pb.SignedBatch, change: Callable[[pb.FeedbackBatch], object]) -> pb.SignedBatch:
        batch = pb.FeedbackBatch.FromString(signed.batch)
        change(batch)
        data = batch.SerializeToString(deterministic=True)
        return pb.SignedBatch(batch=data, signature=identity.sign(self.key, data))


def mixture_of(result: round_pb2.Aggregate) -> dict[str, float]:
    """The share of each bin in the next mixture."""
    return {estimate.bin_id: estimate.weight for estimate in result.bins}


def count(registry: Registry, table: type) -> int:
    with registry.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def refusals(registry: Registry) -> list[tuple[str, str]]:
    with registry.reading() as session:
        return [(row.agent_id, row.reason) for row in session.scalars(sa.select(FeedbackRefusal))]
