"""Takes batches: every check, the mirror of the agent's account, and the batch itself, in one transaction."""

import datetime as dt
import hashlib
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback import nulls
from ebbflow.cloud.feedback.round_rows import plan_of
from ebbflow.cloud.registry import locks
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Base,
    FeedbackBatch,
    FeedbackRefusal,
    PrivacyAccount,
    PrivacyEntry,
    Round,
    RoundMember,
    RoundState,
)
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError
from ebbflow.common.identity import keys
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.checks import Refusal, check_batch, parse_batch, refused
from ebbflow.common.privacy.vector import layout_of

COMPARED_BATCHES = 50
"""How many earlier batches of an agent are compared for noise that was used before."""
MAX_REFUSALS = 100
"""How many refusals of one agent and round are kept; more are refused all the same."""


def submit(
    registry: Registry,
    agent_id: str,
    signed: pb.SignedBatch,
    public_key: ec.EllipticCurvePublicKey,
    now: dt.datetime,
    blobs: BlobStore | None = None,
) -> None:
    """Keeps a batch, or refuses it and keeps only the word that says why. The same bytes again are no error.

    Args:
        registry: where to keep it.
        agent_id: from the peer's certificate.
        signed: as the agent sent it.
        public_key: of the peer's certificate.
        now: time of arrival.
        blobs: where adapter updates go; votes need none.

    Raises:
        EbbflowError: BATCH_REFUSED, ROUND_NOT_FOUND, ROUND_CLOSED or BUDGET_EXHAUSTED, each with the refusal's word in
            `metadata["why"]`. All of them are final: the agent need not try again.
    """
    round_id = ""
    try:
        _check_signature(signed, public_key)
        batch = parse_batch(signed.batch)
        round_id = _round_id(batch.round)
        with registry.transaction() as session:
            _take(session, blobs, agent_id, round_id, signed, batch, now)
    except EbbflowError as error:
        if why := error.metadata.get("why"):
            with registry.transaction() as session:
                _note_refusal(session, agent_id, round_id, why, now)
        raise


def _check_signature(signed: pb.SignedBatch, public_key: ec.EllipticCurvePublicKey) -> None:
    try:
        keys.verify(public_key, signed.signature, signed.batch)
    except EbbflowError:
        raise refused(Refusal.SIGNATURE, "the batch is not signed by the agent's key") from None


def _round_id(name: str) -> str:
    try:
        return names.parse(name, "rounds")
    except EbbflowError:
        raise refused(Refusal.ROUND_UNKNOWN, "the batch names no round") from None


def _note_refusal(session: Session, agent_id: str, round_id: str, why: str, now: dt.datetime) -> None:
    query = sa.select(sa.func.count()).where(FeedbackRefusal.round_id == round_id, FeedbackRefusal.agent_id == agent_id)
    if session.scalar(query) < MAX_REFUSALS:  # type: ignore[operator]
        session.add(FeedbackRefusal(round_id=round_id, agent_id=agent_id, reason=why, create_time=now))


def _take(
    session: Session,
    blobs: BlobStore | None,
    agent_id: str,
    round_id: str,
    signed: pb.SignedBatch,
    batch: pb.FeedbackBatch,
    now: dt.datetime,
) -> None:
    # Copies of one batch that arrive at once, on different replicas, wait here for the first.
    locks.exclusive(session, f"batches of agents/{agent_id}")
    # Shared lock: batches of different agents do not wait for each other, and the round cannot close in between.
    round_ = session.get(Round, round_id, with_for_update={"read": True})
    if round_ is None:
        raise refused(Refusal.ROUND_UNKNOWN, "there is no such round")
    digest = hashlib.sha256(signed.batch).hexdigest()
    if _is_repeat(session, agent_id, round_id, batch.batch_id, digest):
        return
    if session.get(RoundMember, (round_id, agent_id)) is None:
        raise refused(Refusal.NOT_A_MEMBER, "the agent does not belong to the round")
    if round_.state != RoundState.OPEN or round_.end_time <= now:
        raise refused(Refusal.ROUND_CLOSED, "the round is closed")
    plan = plan_of(round_)
    check_batch(plan, hashlib.sha256(round_.plan).digest(), batch)
    _check_noise(session, agent_id, round_, plan, batch)
    _keep(session, agent_id, round_, plan, batch, signed.signature, digest, now)
    if plan.HasField("adapter"):
        # Last, so that nothing of a refused batch is stored. If the commit fails, the next try stores the same bytes.
        if blobs is None:
            raise ValueError("adapter updates need a blob store")
        blobs.put([signed.batch])


def _is_repeat(session: Session, agent_id: str, round_id: str, batch_id: str, digest: str) -> bool:
    """Whether these very bytes were kept before.

    Raises:
        EbbflowError: BATCH_REFUSED if other bytes were, under this id or for this round.
    """
    same = (FeedbackBatch.round_id == round_id) & (FeedbackBatch.agent_id == agent_id)
    kept = session.scalars(sa.select(FeedbackBatch).where(same | (FeedbackBatch.id == batch_id))).all()
    if any(row.agent_id != agent_id or row.batch_sha256 != digest for row in kept):
        raise refused(Refusal.REPLAY, "another batch was kept for this round or under this id")
    return bool(kept)


def _check_noise(session: Session, agent_id: str, round_: Round, plan: pb.RoundPlan, batch: pb.FeedbackBatch) -> None:
    variance, layout = variance_of(plan.mechanism), layout_of(plan)
    cells = layout.null_cells(batch.noisy)
    if nulls.is_under_noised(cells, variance):
        raise refused(Refusal.UNDER_NOISED, "the batch's null bins hold less noise than the plan asks for")
    earlier = sa.select(FeedbackBatch.noisy).where(FeedbackBatch.agent_id == agent_id)
    recent = earlier.order_by(FeedbackBatch.create_time.desc()).limit(COMPARED_BATCHES)
    for noisy in session.scalars(recent):
        if nulls.is_reused(cells, noisy[-layout.nulls :], variance):
            raise refused(Refusal.NOISE_REUSED, "the batch's noise was used before")


def _keep(
    session: Session,
    agent_id: str,
    round_: Round,
    plan: pb.RoundPlan,
    batch: pb.FeedbackBatch,
    signature: bytes,
    digest: str,
    now: dt.datetime,
) -> None:
    """Charges the mirror and keeps the batch."""
    layout, adapter = layout_of(plan), plan.HasField("adapter")
    kept = {
        "id": batch.batch_id,
        "round_id": round_.id,
        "agent_id": agent_id,
        "batch_sha256": digest,
        "noisy": list(layout.null_cells(batch.noisy) if adapter else batch.noisy),
        "payload_sha256": digest if adapter else "",
        "base_release": batch.base_release,
        "signature": signature,
        "create_time": now,
    }
    if not _insert(session, FeedbackBatch, kept):  # another agent took the same id a moment ago
        raise refused(Refusal.REPLAY, "another batch was kept under this id")
    account = {"agent_id": agent_id, "student_id": round_.student_id, "window": round_.window}
    _charge(session, account, plan)
    entry = PrivacyEntry(
        batch_id=batch.batch_id, round_id=round_.id, rho_nano=plan.mechanism.rho_nano, create_time=now, **account
    )
    session.add(entry)
    session.flush()


def _charge(session: Session, account: dict[str, str], plan: pb.RoundPlan) -> None:
    policy, cost = plan.policy, plan.mechanism.rho_nano
    if policy.lifetime_rho_cap_nano:
        spent = sa.select(sa.func.coalesce(sa.func.sum(PrivacyEntry.rho_nano), 0)).where(
            PrivacyEntry.agent_id == account["agent_id"], PrivacyEntry.student_id == account["student_id"]
        )
        if session.scalars(spent).one() + cost > policy.lifetime_rho_cap_nano:
            raise refused(Refusal.LIFETIME, "the agent's budget of all windows together is spent")
    fresh = {**account, "rho_cap_nano": policy.rho_cap_nano, "rho_spent_nano": 0, "delta": policy.delta}
    _insert(session, PrivacyAccount, fresh)
    charged = session.execute(
        sa.update(PrivacyAccount)
        .filter_by(**account)
        .where(PrivacyAccount.rho_spent_nano + cost <= policy.rho_cap_nano)
        .values(rho_spent_nano=PrivacyAccount.rho_spent_nano + cost, rho_cap_nano=policy.rho_cap_nano)
        .execution_options(synchronize_session=False)
    )
    if charged.rowcount != 1:  # type: ignore[attr-defined]
        raise refused(Refusal.BUDGET, "the agent's budget of this window is spent")


def _insert(session: Session, table: type[Base], values: dict[str, Any]) -> bool:
    """Inserts a row unless one with its keys is there; says whether it did."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    keys_of = sa.inspect(table).primary_key
    statement = dialect.insert(table).values(values).on_conflict_do_nothing().returning(*keys_of)
    return session.execute(statement).first() is not None
