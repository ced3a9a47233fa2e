"""The TUF repository, kept in the table `trust_metadata` so that every replica serves the same state."""

import datetime as dt
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

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
from ebbflow.common.trust.ceremony import add_signature

LIFETIMES: Final = roles.LIFETIMES

_FILE_NAME = re.compile(r"(?:(?P<version>[1-9][0-9]{0,17})\.(?P<role>root|targets|snapshot|student)|timestamp)\.json")

Payload = TypeVar("Payload", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class Trusted:
    """What is genuine, as somebody sees it."""

    targets: Targets
    student: Targets
    """The newest published list of releases."""
    current: bool
    """Whether the keys that `targets` names today have signed that list. They have not after keys were replaced, until
    the new ones have signed it anew."""


Trust = Callable[[Session], Trusted]
"""How somebody comes to what is genuine: `trusted`, or an `Anchor` that takes nothing on the registry's word."""


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
    empty: dict[str, dict[str, int]] = {roles.MIN_RELEASE: {}, roles.HIGHEST: {}}
    student = Targets(expires=now + LIFETIMES[roles.STUDENT], unrecognized_fields=empty)
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
    return required(session, roles.ROOT).content


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
        raise altered(row.role) from error
    if not isinstance(metadata.signed, kind):
        raise altered(row.role)
    return metadata


def verified_targets(session: Session) -> Targets:
    """Returns the newest `targets` after checking its signatures against the newest root.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if they do not hold, NOT_INITIALISED if there is no repository.
    """
    root = decode(required(session, roles.ROOT), Root)
    targets = decode(required(session, roles.TARGETS), Targets)
    try:
        root.signed.verify_delegate(roles.ROOT, root.signed_bytes, root.signatures)
        root.signed.verify_delegate(roles.TARGETS, targets.signed_bytes, targets.signatures)
    except RepositoryError as error:
        raise altered(roles.TARGETS) from error
    return targets.signed


def verified_student(session: Session) -> Targets:
    """Returns the published list of releases after checking its signatures up to the root; see `trusted`.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if they do not hold, NOT_INITIALISED if there is no repository.
    """
    return trusted(session).student


def trusted(session: Session) -> Trusted:
    """Returns what the registry's own chain of signatures holds up.

    After a change of the distiller's or gate's key, the list is held up by the version of `targets` before the change.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if a signature does not hold, NOT_INITIALISED if there is no repository.
    """
    targets = verified_targets(session)
    student = decode(required(session, roles.STUDENT), Targets)
    if verifies(targets, roles.STUDENT, student):
        return Trusted(targets, student.signed, current=True)
    roots = [decode(row, Root).signed for row in versions(session, roles.ROOT)]
    if not any(verifies(older, roles.STUDENT, student) for older in older_targets(session, roots)):
        raise altered(roles.STUDENT)
    return Trusted(targets, student.signed, current=False)


def older_targets(session: Session, roots: Sequence[Root]) -> Iterator[Targets]:
    """Yields the versions of `targets` that one of these roots stands behind, newest first."""
    for row in versions(session, roles.TARGETS):
        targets = decode(row, Targets)
        if any(verifies(root, roles.TARGETS, targets) for root in roots):
            yield targets.signed


def verifies(holder: Root | Targets, role: str, metadata: "Metadata[Any]") -> bool:
    """Whether enough keys that `holder` names for a role have signed."""
    try:
        holder.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError):
        return False
    return True


def versions(session: Session, role: str) -> Sequence[TrustMetadata]:
    """Every published version of a role, newest first."""
    rows = sa.select(TrustMetadata).where(TrustMetadata.role == role, TrustMetadata.published.is_(True))
    return session.scalars(rows.order_by(TrustMetadata.version.desc())).all()


def sign_online(session: Session, signer: Signer, now: dt.datetime) -> None:
    """Writes the next snapshot of what is published, and the next timestamp. The caller holds `lock`."""
    last = newest(session, roles.SNAPSHOT)
    meta = {}
    for role in (roles.TARGETS, roles.STUDENT):
        row = required(session, role)
        meta[f"{role}.json"] = MetaFile.from_data(row.version, row.content, ["sha256"])
    version = last.version + 1 if last else 1
    snapshot = Snapshot(version=version, expires=now + LIFETIMES[roles.SNAPSHOT], meta=meta)
    store(session, roles.SNAPSHOT, version, signed(snapshot, signer), now=now)
    sign_timestamp(session, signer, now)


def sign_timestamp(session: Session, signer: Signer, now: dt.datetime) -> None:
    """Replaces the timestamp by the next one. The caller holds `lock`."""
    last, snapshot = newest(session, roles.TIMESTAMP), required(session, roles.SNAPSHOT)
    version = last.version + 1 if last else 1
    meta = MetaFile.from_data(snapshot.version, snapshot.content, ["sha256"])
    timestamp = Timestamp(version=version, expires=now + LIFETIMES[roles.TIMESTAMP], snapshot_meta=meta)
    if last:
        session.delete(last)
    store(session, roles.TIMESTAMP, version, signed(timestamp, signer), now=now)


def signed(payload: Payload, *signers: Signer) -> bytes:
    """Returns the file that carries a payload with these signatures.

    Raises:
        EbbflowError: KEY_UNUSABLE if a key does not sign.
    """
    metadata = Metadata[Payload](payload)
    for signer in signers:
        add_signature(metadata, signer)
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


def required(session: Session, role: str) -> TrustMetadata:
    """The newest published row of a role.

    Raises:
        EbbflowError: NOT_INITIALISED if there is none.
    """
    row = newest(session, role)
    if row is None:
        raise EbbflowError(Reason.NOT_INITIALISED, f"the registry holds no {role} metadata", role=role)
    return row


def altered(role: str) -> EbbflowError:
    """What to raise about metadata that nobody of ours has signed."""
    return EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"the {role} metadata in the registry does not verify", role=role)
