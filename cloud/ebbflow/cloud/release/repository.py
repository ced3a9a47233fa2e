"""The TUF repository, kept in the table `trust_metadata` so that every replica serves the same state."""

import datetime as dt
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

import sqlalchemy as sa
from securesystemslib.signer import Key, Signer
from sqlalchemy.orm import Session
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from ebbflow.cloud.registry import locks
from ebbflow.cloud.registry.tables import TrustMetadata
from ebbflow.cloud.release import keys
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles

LIFETIMES: Final = {
    roles.ROOT: dt.timedelta(days=365),
    roles.TARGETS: dt.timedelta(days=330),  # not on the root's day: two offline ceremonies at once go wrong together
    roles.STUDENT: dt.timedelta(days=14),
    roles.SNAPSHOT: dt.timedelta(days=7),
    roles.TIMESTAMP: dt.timedelta(days=1),
}
"""How long a signature of each role holds."""

_FILE_NAME = re.compile(r"(?:(?P<version>[1-9][0-9]{0,17})\.(?P<role>root|targets|snapshot|student)|timestamp)\.json")

Payload = TypeVar("Payload", Root, Targets, Snapshot, Timestamp)


def initialise(session: Session, folder: Path, now: dt.datetime) -> None:
    """Writes and signs the first version of every role with the keys in `folder`. Does nothing if there is a root.

    Raises:
        EbbflowError: NOT_INITIALISED if a key is missing.
    """
    lock(session)
    if session.get(TrustMetadata, (roles.ROOT, 1)):
        return
    signers = {name: keys.load(folder, name) for name in keys.NAMES}
    public = {name: signer.public_key for name, signer in signers.items()}
    student = Targets(expires=now + LIFETIMES[roles.STUDENT], unrecognized_fields={roles.MIN_RELEASE: {}})
    for role, content in (
        (roles.ROOT, signed(_first_root(public, now), *(signers[name] for name in keys.ROOTS))),
        (roles.TARGETS, signed(_first_targets(public, now), signers["targets"])),
        (roles.STUDENT, signed(student, signers["distiller"], signers["gate"])),
    ):
        store(session, role, 1, content, now=now)
    sign_online(session, signers["online"], now)


def lock(session: Session) -> None:
    """Keeps other replicas from changing the metadata until this transaction ends."""
    locks.exclusive(session, "trust_metadata")


def read_metadata(session: Session, file_name: str) -> bytes:
    """Returns one published file, such as "2.root.json" or "timestamp.json".

    Raises:
        EbbflowError: METADATA_NOT_FOUND if there is none of that name.
    """
    match = _FILE_NAME.fullmatch(file_name)
    row = None
    if match and match["role"]:
        row = session.get(TrustMetadata, (match["role"], int(match["version"])))
    elif match:
        row = newest(session, roles.TIMESTAMP)
    if row is None or not row.published:
        message = f"there is no metadata file {file_name[:80]!r}"
        raise EbbflowError(Reason.METADATA_NOT_FOUND, message, file_name=file_name[:80])
    return row.content


def trust_root(session: Session) -> bytes:
    """Returns the newest root: what a device pins when it enrols.

    Raises:
        EbbflowError: NOT_INITIALISED if there is none.
    """
    return _required(session, roles.ROOT).content


def newest(session: Session, role: str, *, published: bool = True) -> TrustMetadata | None:
    """Returns the newest row of a role, of those that are served or of those that wait for a signature."""
    rows = sa.select(TrustMetadata).where(TrustMetadata.role == role, TrustMetadata.published.is_(published))
    return session.scalars(rows.order_by(TrustMetadata.version.desc()).limit(1)).first()


def store(
    session: Session, role: str, version: int, content: bytes, *, now: dt.datetime, published: bool = True
) -> TrustMetadata:
    """Keeps one version of one role."""
    row = TrustMetadata(role=role, version=version, content=content, published=published, create_time=now)
    session.add(row)
    session.flush()
    return row


def decode(row: TrustMetadata, kind: type[Payload]) -> Metadata[Payload]:
    """Returns the metadata in a row.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if the bytes are not metadata of that kind.
    """
    try:
        metadata = Metadata[Payload].from_bytes(row.content)
    except DeserializationError as error:
        raise _altered(row.role) from error
    if not isinstance(metadata.signed, kind):
        raise _altered(row.role)
    return metadata


def verified_targets(session: Session) -> Targets:
    """Returns the newest `targets` after checking its signatures against the newest root.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if they do not hold, NOT_INITIALISED if there is no repository.
    """
    root = decode(_required(session, roles.ROOT), Root)
    targets = decode(_required(session, roles.TARGETS), Targets)
    try:
        root.signed.verify_delegate(roles.ROOT, root.signed_bytes, root.signatures)
        root.signed.verify_delegate(roles.TARGETS, targets.signed_bytes, targets.signatures)
    except RepositoryError as error:
        raise _altered(roles.TARGETS) from error
    return targets.signed


def verified_student(session: Session) -> Targets:
    """Returns the published list of releases after checking its signatures up to the root.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if they do not hold, NOT_INITIALISED if there is no repository.
    """
    targets = verified_targets(session)
    student = decode(_required(session, roles.STUDENT), Targets)
    try:
        targets.verify_delegate(roles.STUDENT, student.signed_bytes, student.signatures)
    except RepositoryError as error:
        raise _altered(roles.STUDENT) from error
    return student.signed


def sign_online(session: Session, signer: Signer, now: dt.datetime) -> None:
    """Writes the next snapshot of what is published, and the next timestamp. The caller holds `lock`."""
    last = newest(session, roles.SNAPSHOT)
    meta = {}
    for role in (roles.TARGETS, roles.STUDENT):
        row = _required(session, role)
        meta[f"{role}.json"] = MetaFile.from_data(row.version, row.content, ["sha256"])
    version = last.version + 1 if last else 1
    snapshot = Snapshot(version=version, expires=now + LIFETIMES[roles.SNAPSHOT], meta=meta)
    store(session, roles.SNAPSHOT, version, signed(snapshot, signer), now=now)
    sign_timestamp(session, signer, now)


def sign_timestamp(session: Session, signer: Signer, now: dt.datetime) -> None:
    """Replaces the timestamp by the next one. The caller holds `lock`."""
    last, snapshot = newest(session, roles.TIMESTAMP), _required(session, roles.SNAPSHOT)
    version = last.version + 1 if last else 1
    meta = MetaFile.from_data(snapshot.version, snapshot.content, ["sha256"])
    timestamp = Timestamp(version=version, expires=now + LIFETIMES[roles.TIMESTAMP], snapshot_meta=meta)
    if last:
        session.delete(last)
    store(session, roles.TIMESTAMP, version, signed(timestamp, signer), now=now)


def signed(payload: Payload, *signers: Signer) -> bytes:
    """Returns the file that carries a payload with these signatures."""
    metadata = Metadata[Payload](payload)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def _first_root(public: Mapping[str, Key], now: dt.datetime) -> Root:
    root = Root(expires=now + LIFETIMES[roles.ROOT], consistent_snapshot=True)
    for name in keys.ROOTS:
        root.add_key(public[name], roles.ROOT)
    root.roles[roles.ROOT].threshold = roles.ROOT_THRESHOLD
    for name, role in (("targets", roles.TARGETS), ("online", roles.SNAPSHOT), ("online", roles.TIMESTAMP)):
        root.add_key(public[name], role)
    return root


def _first_targets(public: Mapping[str, Key], now: dt.datetime) -> Targets:
    student_keys = [public["distiller"].keyid, public["gate"].keyid]
    feedback_keys = [public["feedback"].keyid]
    delegates = (
        (roles.STUDENT, student_keys, roles.STUDENT_THRESHOLD, roles.STUDENT_PATHS),
        (roles.FEEDBACK, feedback_keys, roles.FEEDBACK_THRESHOLD, roles.FEEDBACK_PATHS),
    )
    delegations = Delegations(
        keys={public[name].keyid: public[name] for name in ("distiller", "gate", "feedback")},
        roles={
            name: DelegatedRole(name, key_ids, threshold, terminating=True, paths=list(paths))
            for name, key_ids, threshold, paths in delegates
        },
    )
    return Targets(expires=now + LIFETIMES[roles.TARGETS], delegations=delegations)


def _required(session: Session, role: str) -> TrustMetadata:
    row = newest(session, role)
    if row is None:
        raise EbbflowError(Reason.NOT_INITIALISED, f"the registry holds no {role} metadata", role=role)
    return row


def _altered(role: str) -> EbbflowError:
    return EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"the {role} metadata in the registry does not verify", role=role)
