"""Forgets batches when their policy's time is over. Their sums stay, and so do charges and refusals."""

import datetime as dt

import sqlalchemy as sa

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback import turns
from ebbflow.cloud.feedback.round_rows import plan_of
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import FeedbackBatch, Round, RoundState
from ebbflow.common.privacy.calibration import DEFAULT_RETENTION_DAYS

_FORGOTTEN = b""  # signature of a batch whose values are gone


def forget(registry: Registry, blobs: BlobStore, now: dt.datetime) -> list[str]:
    """Empties the batches of closed rounds that are beyond their retention; returns the ids of these rounds.

    A batch's row stays with its hash, so that the same bytes are still known for a repetition. A round whose batches
    cannot be forgotten is logged and has its turn again in the next call; it keeps no other.

    Args:
        registry: where the batches are.
        blobs: where adapter updates are.
        now: the time.
    """
    remembered = sa.exists().where(FeedbackBatch.round_id == Round.id, FeedbackBatch.signature != _FORGOTTEN)
    query = sa.select(Round).where(Round.state == RoundState.CLOSED, Round.end_time <= now - dt.timedelta(days=1))
    with registry.reading() as session:
        rows = {row.id: row for row in session.scalars(query.where(remembered))}

    def act(round_id: str) -> bool:
        due = _is_over(rows[round_id], now)
        if due:
            _forget(registry, blobs, round_id)
        return due

    return turns.each("forgetting the batches of", rows, act)


def _is_over(row: Round, now: dt.datetime) -> bool:
    days = plan_of(row).policy.retention_days or DEFAULT_RETENTION_DAYS
    return row.end_time + dt.timedelta(days=days) <= now


def _forget(registry: Registry, blobs: BlobStore, round_id: str) -> None:
    with registry.transaction() as session:
        payloads = sa.select(FeedbackBatch.payload_sha256).where(FeedbackBatch.round_id == round_id)
        # Files first: whatever happens in between, the rows still say what is to be deleted.
        for sha256 in session.scalars(payloads.where(FeedbackBatch.payload_sha256 != "")).all():
            blobs.delete(sha256)
        session.execute(
            sa.update(FeedbackBatch)
            .where(FeedbackBatch.round_id == round_id)
            .values(noisy=[], payload_sha256="", signature=_FORGOTTEN)
            .execution_options(synchronize_session=False)
        )
