"""Offline ceremonies: the next version of `root` or `targets` is staged, signed by people, and checked. No IO.

Whoever signs, the admin's machine and the server look at the same rules, so that nothing is refused at the end that
could have been refused at the table.
"""

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization import DeserializationError

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles

Offline = Literal["root", "targets"]

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {"online": (roles.SNAPSHOT, roles.TIMESTAMP)}
"""What a role may be called by, for people."""
OF_ROOT: Final = (roles.ROOT, roles.TARGETS, roles.SNAPSHOT, roles.TIMESTAMP)
OF_TARGETS: Final = (roles.STUDENT, roles.FEEDBACK)
_LEAST_PREFIX = 6
_MOST_LIFETIME: Final = dt.timedelta(days=2 * 365)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a ceremony changes beside version and expiry."""

    add: Sequence[tuple[str, Key]] = ()
    """Role and the key that joins it."""
    replace: Sequence[tuple[str, Key]] = ()
    """Key id, or its beginning, and the key that takes its place in every role of the file."""
    revoke: Sequence[tuple[str, str]] = ()
    """Role and the key id, or its beginning, that leaves it."""
    threshold: int | None = None
    """Signatures that `root` needs from now on."""
    lifetime: dt.timedelta | None = None
    """How long the signatures hold; None takes the role's usual time."""


@dataclass(frozen=True)
class Quorum:
    """Signatures that one holder of a role asks for."""

    holder: str
    """For people, such as "root 3, which is published"."""
    threshold: int
    signed: tuple[str, ...]
    """Key ids whose signatures hold."""
    unsigned: tuple[str, ...]

    @property
    def missing(self) -> int:
        """How many signatures are still to come."""
        return max(0, self.threshold - len(self.signed))


@dataclass
class Draft:
    """A staged version together with what is published."""

    proposed: "Metadata[Root] | Metadata[Targets]"
    root: Metadata[Root]
    """The published root."""
    targets: Metadata[Targets] | None = None
    """The published targets; needed to look at new targets."""
    quorums: list[Quorum] = field(init=False)

    def __post_init__(self) -> None:
        """Counts the signatures."""
        self.quorums = [_quorum(who, name, holder, self.proposed) for who, name, holder in self._holders()]

    @property
    def role(self) -> Offline:
        """Which role it is a version of."""
        return "root" if isinstance(self.proposed.signed, Root) else "targets"

    def afterwards(self) -> list[str]:
        """Who may sign what once this is published, as sentences."""
        new = self.proposed.signed
        known = OF_ROOT if isinstance(new, Root) else OF_TARGETS
        found = {name: role for name in known if (role := _role(new, name))}
        lines = [
            f"{name} needs {threshold} of {len(keys)} keys: {', '.join(keys)}"
            for name, (keys, threshold) in found.items()
        ]
        return [*lines, f"it expires on {day(new.expires)}"]

    @property
    def _published(self) -> Root | Targets | None:
        if isinstance(self.proposed.signed, Root):
            return self.root.signed
        return self.targets.signed if self.targets else None

    def _holders(self) -> Iterable[tuple[str, str, Root]]:
        new, old = self.proposed.signed, self.root.signed
        if isinstance(new, Root):
            yield f"root {old.version}, which is published", roles.ROOT, old
            yield f"root {new.version} itself", roles.ROOT, new
        else:
            yield f"root {old.version}", roles.TARGETS, old

    def sign(self, signer: Signer) -> None:
        """Adds a signature, in place of an earlier one by the same key.

        Raises:
            EbbflowError: METADATA_REFUSED if the key has no say here; KEY_UNUSABLE.
        """
        key_id = signer.public_key.keyid
        if not any(key_id in (*quorum.signed, *quorum.unsigned) for quorum in self.quorums):
            wanted = sorted({key for quorum in self.quorums for key in (*quorum.signed, *quorum.unsigned)})
            message = f"key {short(key_id)} may not sign {self.role}; these may: {', '.join(map(short, wanted))}"
            raise EbbflowError(Reason.METADATA_REFUSED, message, key_id=key_id)
        add_signature(self.proposed, signer)
        self.__post_init__()

    def check(self, now: dt.datetime) -> None:
        """Whether this may be published, as a strict client and this project's own rules see it.

        Raises:
            EbbflowError: METADATA_REFUSED with everything that is wrong.
        """
        if problems := [*self.faults(now), *self.unsigned()]:
            raise EbbflowError(Reason.METADATA_REFUSED, f"this {self.role} is refused: {'; '.join(problems)}")

    def unsigned(self) -> list[str]:
        """Which signatures are missing, as sentences."""
        return [
            f"{quorum.holder} asks for {quorum.missing} more of these: {', '.join(map(short, quorum.unsigned))}"
            for quorum in self.quorums
            if quorum.missing
        ]

    def faults(self, now: dt.datetime) -> list[str]:
        """What is wrong with its content, whoever has signed it, as sentences."""
        new, published = self.proposed.signed, self._published
        found = []
        if published is not None and new.version != published.version + 1:
            found.append(f"its version is {new.version} and {published.version} is published: stage it anew")
        if new.expires <= now:
            found.append(f"it expired on {day(new.expires)}")
        if new.expires > now + _MOST_LIFETIME:
            found.append(f"it holds until {day(new.expires)}, which is further away than two years")
        return found + (_root_faults(new) if isinstance(new, Root) else _targets_faults(new))

    def changes(self) -> list[str]:
        """What it changes, as sentences."""
        new, old = self.proposed.signed, self._published
        if old is None:
            return []
        found: list[str] = []
        for role in OF_ROOT if isinstance(new, Root) else OF_TARGETS:
            found += _role_changes(role, _role(old, role), _role(new, role))
        if old.expires != new.expires:
            found.append(f"it expires on {day(new.expires)} instead of {day(old.expires)}")
        return found


def stage(base: "Metadata[Root] | Metadata[Targets]", changes: Changes, now: dt.datetime) -> bytes:
    """Returns the next version, without signatures.

    Raises:
        EbbflowError: INVALID_REQUEST if a role or key is none of this file's.
    """
    signed = read(base.to_bytes(), "the published version").signed
    role = roles.ROOT if isinstance(signed, Root) else roles.TARGETS
    for old, new in changes.replace:
        _replace(signed, old, new)
    for name, key in changes.add:
        for of in _roles_of(signed, name):
            signed.add_key(key, of)
    for name, prefix in changes.revoke:
        for of in _roles_of(signed, name):
            signed.revoke_key(_find(_key_ids(signed, of), prefix), of)
    if changes.threshold is not None:
        if not isinstance(signed, Root):
            _wrong("only root's threshold can be changed", "threshold")
        signed.roles[roles.ROOT].threshold = changes.threshold
    signed.version += 1
    lifetime = roles.LIFETIMES[role] if changes.lifetime is None else changes.lifetime
    signed.expires = (now + lifetime).replace(microsecond=0)
    return Metadata(signed).to_bytes()  # type: ignore[type-var]  # either kind will do


def read(data: bytes, what: str) -> "Metadata[Root] | Metadata[Targets]":
    """Decodes a version of `root` or `targets`.

    Raises:
        EbbflowError: METADATA_REFUSED if it is none.
    """
    try:
        metadata = Metadata[Root].from_bytes(data)
    except DeserializationError as error:
        raise EbbflowError(Reason.METADATA_REFUSED, f"{what} is no metadata of The Update Framework") from error
    if not isinstance(metadata.signed, (Root, Targets)):
        raise EbbflowError(Reason.METADATA_REFUSED, f"{what} is neither root nor targets")
    return metadata


def add_signature(metadata: "Metadata[Any]", signer: Signer) -> None:
    """Signs, keeping the other signatures.

    Raises:
        EbbflowError: KEY_UNUSABLE if the key does not sign.
    """
    try:
        metadata.sign(signer, append=True)
    except UnsignedMetadataError as error:
        if isinstance(error.__cause__, EbbflowError):
            raise error.__cause__ from error
        raise EbbflowError(Reason.KEY_UNUSABLE, "the key does not sign") from error


def short(key_id: str) -> str:
    """The beginning of a key id, as people read it."""
    return key_id[:12]


def day(time: dt.datetime) -> str:
    """A day, as people read it."""
    return f"{time:%Y-%m-%d}"


def _quorum(who: str, role: str, holder: Root, proposed: "Metadata[Any]") -> Quorum:
    result = holder.get_verification_result(role, proposed.signed_bytes, proposed.signatures)
    return Quorum(who, result.threshold, tuple(sorted(result.signed)), tuple(sorted(result.unsigned)))


def _root_faults(root: Root) -> list[str]:
    found = [f"role {name} has fewer keys than signatures that it needs" for name in OF_ROOT if _short_of(root, name)]
    if not root.consistent_snapshot:
        found.append("it gives up consistent snapshots")
    if root.roles[roles.ROOT].threshold < roles.ROOT_THRESHOLD:
        found.append(f"root needs at least {roles.ROOT_THRESHOLD} signatures")
    if any(root.roles[name].threshold != 1 for name in ALIASES["online"]):
        found.append("snapshot and timestamp carry exactly one signature: the control plane's")
    return found


def _targets_faults(targets: Targets) -> list[str]:
    delegated = (targets.delegations and targets.delegations.roles) or {}
    if set(delegated) != set(OF_TARGETS):
        return [f"it must delegate to {' and '.join(OF_TARGETS)}, and to nothing else"]
    found = [
        f"role {name} has fewer keys than signatures that it needs" for name in OF_TARGETS if _short_of(targets, name)
    ]
    for name, paths in ((roles.STUDENT, roles.STUDENT_PATHS), (roles.FEEDBACK, roles.FEEDBACK_PATHS)):
        if delegated[name].paths != list(paths) or not delegated[name].terminating:
            found.append(f"role {name} must be for {', '.join(paths)}, and terminating")
    if delegated[roles.STUDENT].threshold != roles.STUDENT_THRESHOLD:
        found.append(f"role student must need {roles.STUDENT_THRESHOLD} signatures: the distiller's and the gate's")
    if delegated[roles.FEEDBACK].threshold != roles.FEEDBACK_THRESHOLD:
        found.append("role feedback must need one signature")
    if targets.targets:
        found.append("it lists files, which only role student may")
    return found


def _short_of(signed: Root | Targets, name: str) -> bool:
    role = _role(signed, name)
    return role is None or len(role[0]) < role[1]


def _role(signed: Root | Targets, name: str) -> tuple[tuple[str, ...], int] | None:
    try:
        role = signed.get_delegated_role(name)
    except ValueError:
        return None
    return tuple(role.keyids), role.threshold


def _role_changes(
    name: str, old: tuple[tuple[str, ...], int] | None, new: tuple[tuple[str, ...], int] | None
) -> Iterable[str]:
    old_keys, old_threshold = old or ((), 0)
    new_keys, new_threshold = new or ((), 0)
    yield from (f"key {key} joins role {name}" for key in new_keys if key not in old_keys)
    yield from (f"key {key} leaves role {name}" for key in old_keys if key not in new_keys)
    if old_threshold != new_threshold:
        yield f"role {name} needs {new_threshold} signatures instead of {old_threshold}"


def _roles_of(signed: Root | Targets, name: str) -> tuple[str, ...]:
    known = OF_ROOT if isinstance(signed, Root) else OF_TARGETS
    found = ALIASES.get(name, (name,))
    if not set(found) <= set(known):
        aliases = [alias for alias, of in ALIASES.items() if set(of) <= set(known)]
        _wrong(f"{name!r} is no role here; there are {', '.join([*known, *aliases])}", "role")
    return found


def _key_ids(signed: Root | Targets, name: str) -> list[str]:
    return list(signed.get_delegated_role(name).keyids)


def _replace(signed: Root | Targets, old: str, new: Key) -> None:
    """Puts a key in the place of another, in every role that has it."""
    known = OF_ROOT if isinstance(signed, Root) else OF_TARGETS
    key_id = _find({key for name in known for key in _key_ids(signed, name)}, old)
    for name in known:
        if key_id in _key_ids(signed, name):
            signed.add_key(new, name)
            signed.revoke_key(key_id, name)


def _find(key_ids: Iterable[str], prefix: str) -> str:
    found = [key_id for key_id in set(key_ids) if key_id.startswith(prefix)]
    if len(found) != 1 or len(prefix) < _LEAST_PREFIX:
        known = ", ".join(sorted(map(short, key_ids)))
        _wrong(f"{prefix!r} names {len(found)} keys; name one by at least {_LEAST_PREFIX} characters: {known}", "key")
    return found[0]


def _wrong(message: str, name: str) -> NoReturn:
    raise EbbflowError(Reason.INVALID_REQUEST, message, field=name)
