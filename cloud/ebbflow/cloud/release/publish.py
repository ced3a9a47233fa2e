"""How a release becomes trusted: the distiller proposes, the gate approves, the server publishes.

At most one proposal is open at a time. It is an unpublished row of role `student`; until both signatures are there no
device sees it. Every function is one step inside the caller's transaction, and safe to repeat on any replica. Distiller
and gate hand in how they come to what is genuine; see `anchor`.
"""

import datetime as dt
import hashlib
from dataclasses import dataclass

import sqlalchemy as sa
from securesystemslib.signer import Signer
from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from ebbflow.cloud.registry import changes, clock
from ebbflow.cloud.registry.tables import Json, Release, ReleaseState, Student, TrustMetadata
from ebbflow.cloud.release import repository, rules
from ebbflow.cloud.release.repository import Trust, Trusted
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles
from ebbflow.common.trust.ceremony import add_signature


@dataclass(frozen=True)
class Proposal:
    """A version of the list of releases that waits for the gate."""

    digest: str
    """SHA-256 of what is signed, hexadecimal: an answer to this proposal is never taken for another."""
    version: int
    change: rules.Change


def propose(
    session: Session, signer: Signer, now: dt.datetime | None = None, trust: Trust = repository.trusted
) -> Proposal | None:
    """Signs the next version of the list of releases as the distiller, if there is a reason for one.

    What was revoked, retired or forbidden goes first; then the oldest packed release is added; without one, the list is
    signed anew when half of its life is over or the keys of its signers were replaced. A proposal that the published
    version, a revocation or other keys have overtaken is withdrawn first, and its release is packed again. A release
    whose files break a rule is turned down.

    Returns:
        The proposal, or None if one is open already or nothing is to be done.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if the registry's metadata does not verify; KEY_UNUSABLE.
    """
    now = now or clock.now()
    repository.lock(session)
    trusted, facts = trust(session), facts_of(session)
    amended = rules.amend(trusted.student, facts, now)
    if (row := _open_row(session)) and not _withdraw_stale(session, row, trusted, facts, now, amended is not None):
        return None
    proposed = amended or _with_next_release(session, trusted.student, facts, now)
    if proposed is None and (_half_over(trusted.student, now) or not trusted.current):
        proposed = rules.renew(trusted.student, now)
    if proposed is None:
        return None
    metadata = Metadata(proposed)
    add_signature(metadata, signer)
    repository.store(session, roles.STUDENT, proposed.version, metadata.to_bytes(), now=now, published=False)
    return _proposal(metadata, trusted.student, now, facts)


def facts_of(session: Session) -> rules.Facts:
    """What the registry says that a version of the list may follow from."""
    gone = sa.select(Release.student_id, Release.number).where(
        Release.state.in_([ReleaseState.REVOKED, ReleaseState.RETIRED])
    )
    wishes = sa.select(Student.id, Student.min_release).where(Student.min_release > 0)
    return rules.Facts(
        frozenset((row.student_id, row.number) for row in session.execute(gone)),
        {row.id: row.min_release for row in session.execute(wishes)},
    )


def _with_next_release(session: Session, base: Targets, facts: rules.Facts, now: dt.datetime) -> Targets | None:
    """The list with the oldest packed release; None if there is none, or it breaks a rule and is turned down."""
    release = session.scalars(
        sa.select(Release)
        .where(Release.state == ReleaseState.PACKED)
        .order_by(Release.create_time, Release.student_id, Release.number)
        .limit(1)
    ).first()
    if release is None:
        return None
    try:
        proposed = rules.add_release(base, release.student_id, release.number, release.targets, now, facts)
    except EbbflowError as error:
        release.state, release.reason = ReleaseState.REJECTED, str(error)[:1024]
        return None
    release.state = ReleaseState.PROPOSED
    return proposed


def open_proposal(
    session: Session, now: dt.datetime | None = None, trust: Trust = repository.trusted
) -> Proposal | None:
    """Returns the proposal that waits for the gate, if there is one.

    One that has its signature does not wait, nor does one that nobody has signed whom `targets` names today.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if it breaks a rule: the gate answers with `reject`. METADATA_STALE if it was
            overtaken: the distiller withdraws it.
    """
    row = _open_row(session)
    if row is None:
        return None
    metadata = repository.decode(row, Targets)
    trusted = trust(session)
    signed = _signed_by(trusted, metadata)
    if not 0 < len(signed) < roles.STUDENT_THRESHOLD:
        return None
    return _proposal(metadata, trusted.student, now or clock.now(), facts_of(session))


def approve(
    session: Session,
    signer: Signer,
    proposal: Proposal,
    card: Json | None = None,
    now: dt.datetime | None = None,
    trust: Trust = repository.trusted,
) -> None:
    """Adds the gate's signature to the proposal that the gate has evaluated, and keeps the evaluation card.

    Raises:
        EbbflowError: METADATA_STALE if another proposal is open by now; ARTEFACT_UNTRUSTED if it breaks a rule or lacks
            the distiller's signature; KEY_UNUSABLE.
    """
    repository.lock(session)
    row = _the_row(session, proposal)
    metadata = repository.decode(row, Targets)
    trusted = trust(session)
    _proposal(metadata, trusted.student, now or clock.now(), facts_of(session))
    add_signature(metadata, signer)
    if len(_signed_by(trusted, metadata)) < roles.STUDENT_THRESHOLD:
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
    metadata, trusted = repository.decode(row, Targets), repository.trusted(session)
    if len(_signed_by(trusted, metadata)) < roles.STUDENT_THRESHOLD:
        return False
    try:
        change = rules.check(trusted.student, metadata.signed, now, facts_of(session))
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
    """Signs snapshot and timestamp anew when half of their life is over or their key was replaced.

    Returns:
        True if this call signed anything.

    Raises:
        EbbflowError: KEY_UNUSABLE if the root does not let this key sign.
    """
    now = now or clock.now()
    if _due(session, now) is None:
        return False
    repository.lock(session)
    session.expire_all()
    due = _due(session, now)
    if due is not None and not may_sign_online(session, signer):
        message = f"the root does not let the key {signer.public_key.keyid} sign snapshot and timestamp"
        raise EbbflowError(Reason.KEY_UNUSABLE, message, key_id=signer.public_key.keyid)
    if due == roles.SNAPSHOT:
        repository.sign_online(session, signer, now)
    elif due == roles.TIMESTAMP:
        repository.sign_timestamp(session, signer, now)
    return due is not None


def may_sign_online(session: Session, signer: Signer) -> bool:
    """Whether the newest root names this key for both online roles."""
    root = repository.decode(repository.required(session, roles.ROOT), Root).signed
    return all(signer.public_key.keyid in root.roles[role].keyids for role in (roles.SNAPSHOT, roles.TIMESTAMP))


def _due(session: Session, now: dt.datetime) -> str | None:
    root = repository.decode(repository.required(session, roles.ROOT), Root).signed
    snapshot = repository.decode(repository.required(session, roles.SNAPSHOT), Snapshot)
    timestamp = repository.decode(repository.required(session, roles.TIMESTAMP), Timestamp)
    if _half_over(snapshot.signed, now) or not repository.verifies(root, roles.SNAPSHOT, snapshot):
        return roles.SNAPSHOT
    timestamp_held = repository.verifies(root, roles.TIMESTAMP, timestamp)
    return roles.TIMESTAMP if _half_over(timestamp.signed, now) or not timestamp_held else None


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


def _withdraw_stale(
    session: Session, row: TrustMetadata, trusted: Trusted, facts: rules.Facts, now: dt.datetime, urgent: bool
) -> bool:
    """Takes the open proposal back if it leads nowhere any more, or stands in the way of a revocation."""
    metadata = repository.decode(row, Targets)
    signed = _signed_by(trusted, metadata)
    try:
        change = rules.check(trusted.student, metadata.signed, now, facts)
        in_the_way = urgent and len(signed) < roles.STUDENT_THRESHOLD and not (change.removed or change.raised)
        stale = in_the_way or not signed
    except EbbflowError as error:
        waits = 0 < len(signed) < roles.STUDENT_THRESHOLD and not urgent
        if error.reason is not Reason.METADATA_STALE and waits:
            return False  # the gate's to turn down, with a reason
        stale = True
    if not stale:
        return False
    session.delete(row)
    for release in _proposed(session):
        release.state = ReleaseState.PACKED
    session.flush()
    return True


def _proposal(metadata: Metadata[Targets], base: Targets, now: dt.datetime, facts: rules.Facts) -> Proposal:
    change = rules.check(base, metadata.signed, now, facts)
    return Proposal(_digest(metadata), metadata.signed.version, change)


def _digest(metadata: Metadata[Targets]) -> str:
    return hashlib.sha256(metadata.signed_bytes).hexdigest()


def _signed_by(trusted: Trusted, metadata: Metadata[Targets]) -> set[str]:
    """Keys that `targets` names today, and that have signed."""
    result = trusted.targets.get_verification_result(roles.STUDENT, metadata.signed_bytes, metadata.signatures)
    return set(result.signed)
