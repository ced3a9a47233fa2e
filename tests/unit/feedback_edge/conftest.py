"""A store, a cloud's signing key, and plans that it has signed."""

import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from feedback_world import signed_policy
from securesystemslib.signer import CryptoSigner, Key

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)
TOPICS = ("files", "dates", "networks")

Admit = Callable[..., AdmittedPlan]


@pytest.fixture
def now() -> dt.datetime:
    return NOW


@pytest.fixture(scope="session")
def signer() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


@pytest.fixture
def keys(signer: CryptoSigner) -> dict[str, Key]:
    return {signer.public_key.keyid: signer.public_key}


@pytest.fixture
def make(signer: CryptoSigner) -> Callable[..., pb.RoundPlan]:
    def make(
        round_id: str = "r1", student: str = "faq", at: dt.datetime = NOW, epsilon: float = 4.0, **more: object
    ) -> pb.RoundPlan:
        bins = [pb.Bin(bin_id=topic, texts=[topic]) for topic in TOPICS]
        timing = Timing(at, dt.timedelta(days=1), dt.timedelta(days=7))
        policy = signed_policy(pb.PrivacyPolicy(epsilon=epsilon), student, signer)
        return make_plan(round_id, student, policy, bins, timing, **more)  # type: ignore[arg-type]

    return make


@pytest.fixture
def admitted(make: Callable[..., pb.RoundPlan], signer: CryptoSigner, keys: dict[str, Key]) -> Admit:
    """Makes, signs and admits a plan."""

    def admitted(*, ceiling: Ceiling | None = None, at: dt.datetime = NOW, **fields: object) -> AdmittedPlan:
        signed = PlanSigner(signer).sign(make(at=at, **fields))
        return admit(signed, keys, ceiling or Ceiling(), at)

    return admitted


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    opened = FeedbackStore(tmp_path / "agent.db")
    yield opened
    opened.close()
