"""Counters by which every replica notices that agents should look again."""

from typing import Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import Change

Subject = Literal["desired_state", "plan"]


def bump(session: Session, subject: Subject) -> None:
    """Moves a counter; seen by the replicas when the transaction commits."""
    moved = session.execute(sa.update(Change).where(Change.subject == subject).values(revision=Change.revision + 1))
    if moved.rowcount == 0:  # type: ignore[attr-defined]
        session.add(Change(subject=subject, revision=1))
        session.flush()


def revisions(session: Session) -> dict[str, int]:
    """All counters."""
    return {row.subject: row.revision for row in session.scalars(sa.select(Change))}
