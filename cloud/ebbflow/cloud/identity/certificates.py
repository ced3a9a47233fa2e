"""The register of signed certificates, by which they are revoked."""

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.identity.authority import Issued
from ebbflow.cloud.registry.tables import Certificate
from ebbflow.common.errors import EbbflowError, Reason


def record(session: Session, issued: Issued, now: dt.datetime) -> None:
    """Notes a certificate in the transaction that hands it out. One that was never noted is refused."""
    session.add(
        Certificate(
            serial=issued.serial,
            subject=issued.identity.name,
            role=issued.identity.role,
            public_key_sha256=issued.public_key_sha256,
            expire_time=issued.expire_time,
            create_time=now,
        )
    )


def is_revoked(session: Session, serial: str) -> bool:
    """Whether a certificate was revoked or is unknown, as after the registry was restored from an older copy."""
    row = session.get(Certificate, serial)
    return row is None or row.revoke_time is not None


def check(session: Session, serial: str) -> Certificate:
    """Returns the certificate with a serial number, for a call that it may make.

    Raises:
        EbbflowError: CERTIFICATE_REVOKED, or CERTIFICATE_INVALID if it is unknown.
    """
    row = session.get(Certificate, serial)
    if row is None:
        raise EbbflowError(Reason.CERTIFICATE_INVALID, "the certificate is not in the registry")
    if row.revoke_time is not None:
        raise EbbflowError(Reason.CERTIFICATE_REVOKED, f"the certificate of {row.subject} was revoked")
    return row


def revoke_subject(session: Session, subject: str, now: dt.datetime, keep_serial: str = "") -> int:
    """Revokes every certificate of a subject such as "agents/kiosk-7", save one; returns how many."""
    condition = (
        (Certificate.subject == subject) & Certificate.revoke_time.is_(None) & (Certificate.serial != keep_serial)
    )
    changed = session.execute(sa.update(Certificate).where(condition).values(revoke_time=now))
    return int(changed.rowcount)  # type: ignore[attr-defined]


def newest_expiry(session: Session, subject: str) -> dt.datetime | None:
    """When the last of a subject's certificates expires; none if it has none that are not revoked."""
    condition = (Certificate.subject == subject) & Certificate.revoke_time.is_(None)
    return session.scalar(sa.select(sa.func.max(Certificate.expire_time)).where(condition))
