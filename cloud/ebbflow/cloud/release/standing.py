"""Where every role of The Update Framework stands, and what somebody must do about it."""

import datetime as dt
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from ebbflow.cloud.release import repository
from ebbflow.common.trust import roles
from ebbflow.common.trust.ceremony import day

LATE: Final = 0.4
"""Share of a lifetime that is left when what signs by itself at half-life should have done so."""
_NOTHING: Final = "agents install nothing until then"


@dataclass(frozen=True)
class KeyStanding:
    """One key of a role."""

    key_id: str
    scheme: str
    signed: bool
    """Whether it has signed the newest version."""


@dataclass(frozen=True)
class RoleStanding:
    """One role."""

    role: str
    version: int
    """0 for `feedback`, which has no file of its own."""
    expires: dt.datetime | None
    threshold: int
    keys: tuple[KeyStanding, ...]
    action: str
    """What somebody must do, as a sentence; empty if nothing."""

    @property
    def enough(self) -> bool:
        """Whether enough of the keys have signed."""
        return sum(key.signed for key in self.keys) >= self.threshold


@dataclass(frozen=True)
class OwnKeys:
    """Ids of the keys that the control plane signs with."""

    online: str
    feedback: str


def standing(session: Session, own: OwnKeys, now: dt.datetime) -> list[RoleStanding]:
    """Returns every role, in the order of trust.

    Raises:
        EbbflowError: NOT_INITIALISED, ARTEFACT_UNTRUSTED if a file is none.
    """
    root = repository.decode(repository.required(session, roles.ROOT), Root)
    targets = repository.decode(repository.required(session, roles.TARGETS), Targets)
    student = repository.decode(repository.required(session, roles.STUDENT), Targets)
    snapshot = repository.decode(repository.required(session, roles.SNAPSHOT), Snapshot)
    timestamp = repository.decode(repository.required(session, roles.TIMESTAMP), Timestamp)
    return [
        _role(roles.ROOT, root.signed, root, now, own),
        _role(roles.TARGETS, root.signed, targets, now, own),
        _role(roles.STUDENT, targets.signed, student, now, own),
        _feedback(targets.signed, own),
        _role(roles.SNAPSHOT, root.signed, snapshot, now, own),
        _role(roles.TIMESTAMP, root.signed, timestamp, now, own),
    ]


def _role(name: str, holder: Root | Targets, metadata: "Metadata[Any]", now: dt.datetime, own: OwnKeys) -> RoleStanding:
    result = holder.get_verification_result(name, metadata.signed_bytes, metadata.signatures)
    role = holder.get_delegated_role(name)
    keys = tuple(
        KeyStanding(key_id, holder.get_key(key_id).scheme, key_id in result.signed) for key_id in sorted(role.keyids)
    )
    left = metadata.signed.expires - now
    found = RoleStanding(name, metadata.signed.version, metadata.signed.expires, role.threshold, keys, "")
    action = _offline(found, left) if name in {roles.ROOT, roles.TARGETS} else _automatic(found, left, own)
    return RoleStanding(name, found.version, found.expires, found.threshold, keys, action)


def _offline(role: RoleStanding, left: dt.timedelta) -> str:
    how = f"`ebbflow trust stage {role.role}`, signed with {role.threshold} of {len(role.keys)} keys"
    if not role.enough:
        return f"its keys were replaced, and agents install nothing until a version is signed by the new ones: {how}"
    if role.expires is None or left > roles.WARNING:
        return ""
    if left <= dt.timedelta():
        return f"it expired on {day(role.expires)}, and agents install nothing until there is a new version: {how}"
    return f"it expires in {left.days} days: publish a new version before {day(role.expires)}: {how}"


def _automatic(role: RoleStanding, left: dt.timedelta, own: OwnKeys) -> str:
    known = {key.key_id for key in role.keys}
    if role.role == roles.STUDENT and not role.enough:
        return f"run `ebbflow cloud work` and `ebbflow cloud gate` with the keys that targets names: {_NOTHING}"
    if role.role != roles.STUDENT and own.online not in known:
        return f"restart `ebbflow cloud serve` with the key that root names (setting online_key): {_NOTHING}"
    if role.enough and left >= LATE * roles.LIFETIMES[role.role]:
        return ""
    if role.role == roles.STUDENT:
        return "see that `ebbflow cloud work` and `ebbflow cloud gate` run: they should have signed it anew"
    return "look at the log of `ebbflow cloud serve`: it should have signed it anew"


def _feedback(targets: Targets, own: OwnKeys) -> RoleStanding:
    role = targets.get_delegated_role(roles.FEEDBACK)
    keys = tuple(KeyStanding(key_id, targets.get_key(key_id).scheme, False) for key_id in sorted(role.keyids))
    action = ""
    if own.feedback not in {key.key_id for key in keys}:
        action = (
            "restart `ebbflow cloud serve` with the key that targets names (setting feedback_key): no plan is taken"
        )
    return RoleStanding(roles.FEEDBACK, 0, None, role.threshold, keys, action)
