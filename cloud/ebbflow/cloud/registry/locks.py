"""Mutual exclusion between replicas, for the length of a transaction."""

import zlib

import sqlalchemy as sa
from sqlalchemy.orm import Session


def exclusive(session: Session, name: str) -> None:
    """Waits until no other transaction holds `name`, then holds it until this one ends.

    SQLite's writing transactions already exclude each other, so this does nothing there. On PostgreSQL the wait has the
    limit of every other (`engine.LOCK_TIMEOUT_S`), after which the transaction ends with DATABASE_UNAVAILABLE.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(zlib.crc32(name.encode()))))
