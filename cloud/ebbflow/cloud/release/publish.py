"""How a release becomes trusted: the distiller proposes, the gate approves, the server publishes.

At most one proposal is open at a time. It is an unpublished row of role `student`; until both signatures are there no
device sees it. Every function is one step inside the caller's transaction, and safe to repeat on any replica.
"""

import datetime as dt
import hashlib
from dataclasses import dataclass

import sqlalchemy as sa
from securesystemslib.signer import Signer
from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from ebbflow.cloud.registry import changes, clock
from ebbflow.cloud.registry.tables import Json, Release, ReleaseState, TrustMetadata
from ebbflow.cloud.release import repository, rules
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles


@dataclass(frozen=True)
class Proposal:
    """A version of the list of releases that waits for the gate."""

    digest: str
    """SHA-256 of what is signed, hexadecimal: an answer to this proposal is never taken for another."""
    version: int
    change: rules.Change


def propose(session: Session, signer: Signer, now: dt.datetime | None = None) -> Proposal | None:
    """Signs the next version of the list of releases as the distiller, if there is a reason for one.

    The oldest packed release is added; without one, the list is signed anew when half of its life is over. A proposal
    that the published version has overtaken is withdrawn first, and its release is packed again. A release whose files
    break a rule is turned down.

    Returns:
        The proposal, or None if one is open already or nothing is to be done.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if the registry's metadata does not verify.
    """
    now = now or clock.now()
    repository.lock(session)
    base = repository.verified_student(session)
    if (row := _open_row(session)) and not _withdraw_stale(session, row, base, now):
        return None
    release = session.scalars(
        sa.select(Release)
        .where(Release.state == ReleaseState.PACKED)
        .order_by(Release.create_time, Release.student_id, Release.number)
        .limit(1)
    ).first()
    if release is None and not _half_over(base, now):
        return None
    if release is None:
        proposed = rules.renew(base, now)
    else:
        try:
            proposed = rules.add_release(base, release.student_id, release.number, release.targets, now)
        except EbbflowError as error:
            release.state, release.reason = ReleaseState.REJECTED, str(error)[:1024]
            return None
        release.state = ReleaseState.PROPOSED
    metadata = Metadata(proposed)
    metadata.sign(signer)
    repository.store(session, roles.STUDENT, proposed.version, metadata.to_bytes(), now=now, published=False)
    return _proposal(metadata, base, now)


def open_proposal(session: Session, now: dt.datetime | None = None) -> Proposal | None:
    """Returns the proposal that waits for the gate, if there is one; one that has its signature does not wait.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if it breaks a rule: the gate answers with `reject`. METADATA_STALE if it was
            overtaken: the distiller withdraws it.
    """
    row = _open_row(session)
    if row is None:
        return None
    metadata = repository.decode(row, Targets)
    if _fully_signed(session, metadata):
        return None
    return _proposal(metadata, repository.verified_student(session), now or clock.now())


def approve(
    session: Session, signer: Signer, proposal: Proposal, card: Json | None = None, now: dt.datetime | None = None
) -> None:
    """Adds the gate's signature to the proposal that the gate has evaluated, and keeps the evaluation card.

    Raises:
        EbbflowError: METADATA_STALE if another proposal is open by now; ARTEFACT_UNTRUSTED if it breaks a rule or lacks
            the distiller's signature.
    """
    repository.lock(session)
    row = _the_row(session, proposal)
    metadata = repository.decode(row, Targets)
    _proposal(metadata, repository.verified_student(session), now or clock.now())
    metadata.sign(signer, append=True)
    if not _fully_signed(session, metadata):
        message = "the proposal lacks the signature of the distiller, or this key is not the gate's"
        raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, message)
    row.content = metadata.to_bytes()
    if release := _release(session, proposal.change):
        release.card = card or {}


def reject(session: Session, reason: str, proposal: Proposal | None = None, card: Json | None = None) -> None:
    """Turns the open proposal down and says why in its release. Without `proposal`, whichever is open.

    Raises:
        EbbflowError: METADATA_STALE if another proposal is open by now.
    """
    repository.lock(session)
    row = _the_row(session, proposal) if proposal else _open_row(session)
    if row is None:
        return
    session.delete(row)
    for release in _proposed(session):
        release.state, release.reason, release.card = ReleaseState.REJECTED, reason[:1024], card or {}
    session.flush()


def publish(session: Session, signer: Signer, now: dt.datetime | None = None) -> bool:
    """Publishes the open proposal as the server, if distiller and gate have signed it.

    Returns:
        True if this call published it.
    """
    now = now or clock.now()
    if _open_row(session) is None:
        return False
    repository.lock(session)
    session.expire_all()  # what was read before the lock may be another replica's past
    row = _open_row(session)
    if row is None:
        return False
    metadata = repository.decode(row, Targets)
    if not _fully_signed(session, metadata):
        return False
    try:
        change = rules.check(repository.verified_student(session), metadata.signed, now)
    except EbbflowError as error:
        if error.reason is not Reason.METADATA_STALE:
            raise
        return False
    row.published = True
    if release := _release(session, change):
        release.state = ReleaseState.PUBLISHED
    session.flush()
    repository.sign_online(session, signer, now)
    changes.bump(session, "desired_state")
    return True


def refresh_online(session: Session, signer: Signer, now: dt.datetime | None = None) -> bool:
    """Signs snapshot and timestamp anew when half of their life is over.

    Returns:
        True if this call signed anything.
    """
    now = now or clock.now()
    if _due(session, now) is None:
        return False
    repository.lock(session)
    session.expire_all()
    due = _due(session, now)
    if due == roles.SNAPSHOT:
        repository.sign_online(session, signer, now)
    elif due == roles.TIMESTAMP:
        repository.sign_timestamp(session, signer, now)
    return due is not None


def _due(session: Session, now: dt.datetime) -> str | None:
    snapshot, timestamp = repository.newest(session, roles.SNAPSHOT), repository.newest(session, roles.TIMESTAMP)
    if snapshot is None or timestamp is None:
        raise EbbflowError(Reason.NOT_INITIALISED, "the registry holds no trust metadata")
    if _half_over(repository.decode(snapshot, Snapshot).signed, now):
        return roles.SNAPSHOT
    return roles.TIMESTAMP if _half_over(repository.decode(timestamp, Timestamp).signed, now) else None


def _half_over(signed: Targets | Snapshot | Timestamp, now: dt.datetime) -> bool:
    lifetime = repository.LIFETIMES[roles.STUDENT if isinstance(signed, Targets) else signed.type]
    return signed.expires - now <= lifetime / 2


def _open_row(session: Session) -> TrustMetadata | None:
    return repository.newest(session, roles.STUDENT, published=False)


def _the_row(session: Session, proposal: Proposal) -> TrustMetadata:
    row = _open_row(session)
    if row is None or _digest(repository.decode(row, Targets)) != proposal.digest:
        raise EbbflowError(Reason.METADATA_STALE, f"proposal {proposal.version} is no longer the open one")
    return row


def _release(session: Session, change: rules.Change) -> Release | None:
    return session.get(Release, (change.student_id, change.number)) if change.student_id else None


def _proposed(session: Session) -> list[Release]:
    return list(session.scalars(sa.select(Release).where(Release.state == ReleaseState.PROPOSED)))


def _withdraw_stale(session: Session, row: TrustMetadata, base: Targets, now: dt.datetime) -> bool:
    try:
        rules.check(base, repository.decode(row, Targets).signed, now)
    except EbbflowError as error:
        if error.reason is not Reason.METADATA_STALE:
            return False  # the gate's to turn down, with a reason
        session.delete(row)
        for release in _proposed(session):
            release.state = ReleaseState.PACKED
        session.flush()
        return True
    return False


def _proposal(metadata: Metadata[Targets], base: Targets, now: dt.datetime) -> Proposal:
    change = rules.check(base, metadata.signed, now)
    return Proposal(_digest(metadata), metadata.signed.version, change)


def _digest(metadata: Metadata[Targets]) -> str:
    return hashlib.sha256(metadata.signed_bytes).hexdigest()


def _fully_signed(session: Session, metadata: Metadata[Targets]) -> bool:
    targets = repository.verified_targets(session)
    result = targets.get_verification_result(roles.STUDENT, metadata.signed_bytes, metadata.signatures)
    return result.verified
