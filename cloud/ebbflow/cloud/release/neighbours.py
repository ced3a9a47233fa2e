"""Which files of weights belong together, and to whom they may be given. Reads the registry, changes nothing."""

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import Assignment, Delta, DeviceState, Release, ReleaseState, Rollout, RolloutDevice
from ebbflow.cloud.release.deltas import Pair
from ebbflow.common.trust.roles import PRECISIONS

Shelf = dict[tuple[str, str], set[str]]
"""Files by student and kind."""


def shelf(session: Session, agent_id: str | None = None) -> Shelf:
    """Returns the SHA-256 of the files of all releases in the signed list; a revoked release has none.

    Args:
        session: the caller's transaction.
        agent_id: leaves out the students that this agent was never given.
    """
    query = sa.select(Release.student_id, Release.targets).where(Release.state == ReleaseState.PUBLISHED)
    if agent_id is not None:
        students = sa.select(Assignment.student_id).where(Assignment.agent_id == agent_id)
        query = query.where(Release.student_id.in_(students))
    found: Shelf = {}
    for student_id, targets in session.execute(query):
        for file in targets.values():
            found.setdefault((student_id, file["kind"]), set()).add(file["sha256"])
    return found


def may_read(session: Session, agent_id: str | None, sha256: str) -> bool:
    """Whether a blob is a file of a release of the agent's students, or a delta between two of them.

    Args:
        session: the caller's transaction.
        agent_id: None asks about all students.
        sha256: of the blob.
    """
    files = shelf(session, agent_id)
    if any(sha256 in group for group in files.values()):
        return True
    rows = session.execute(sa.select(Delta.base_sha256, Delta.target_sha256).where(Delta.blob_sha256 == sha256))
    return any(pairs_to(files, target, [base]) for base, target in rows)


def pairs_to(files: Shelf, target_sha256: str, base_sha256s: Iterable[str]) -> list[Pair]:
    """Pairs each base with a target of the same student and precision; leaves out what is unknown or foreign."""
    weights = [group for (_, kind), group in files.items() if kind in PRECISIONS and target_sha256 in group]
    return [
        Pair(base, target_sha256)
        for base in dict.fromkeys(base_sha256s)
        if base != target_sha256 and any(base in group for group in weights)
    ]


def pairs_between(base: Release, target: Release) -> dict[str, Pair]:
    """Pairs the files of two releases, by precision, where both have it."""
    old, new = weights_of(base), weights_of(target)
    return {kind: Pair(old[kind], new[kind]) for kind in PRECISIONS if kind in old and kind in new}


def weights_of(release: Release) -> dict[str, str]:
    """SHA-256 of a release's weights by precision."""
    return {file["kind"]: file["sha256"] for file in release.targets.values() if file["kind"] in PRECISIONS}


def pairs_of_rollout(session: Session, rollout: Rollout) -> list[Pair]:
    """Pairs that the devices of a rollout will ask for: from what they say they serve, in the precision they serve."""
    target = session.get(Release, (rollout.student_id, rollout.release_number))
    if target is None or target.state is not ReleaseState.PUBLISHED:
        return []
    precision = Assignment.installation["precision"].as_string()
    query = (
        sa.select(Assignment.serving_number, precision)
        .join(RolloutDevice, RolloutDevice.agent_id == Assignment.agent_id)
        .where(
            RolloutDevice.rollout_id == rollout.id,
            RolloutDevice.state.in_((DeviceState.WAITING, DeviceState.ASSIGNED)),
            Assignment.student_id == rollout.student_id,
            Assignment.serving_number != rollout.release_number,
        )
        .distinct()
    )
    served: dict[int, set[str]] = {}
    for number, name in session.execute(query):
        served.setdefault(number, set()).add(str(name).removeprefix("PRECISION_").lower())
    bases = session.scalars(
        sa.select(Release).where(
            Release.student_id == rollout.student_id,
            Release.number.in_(served),
            Release.state == ReleaseState.PUBLISHED,
        )
    )
    return [
        pair
        for base in bases
        for kind, pair in pairs_between(base, target).items()
        if kind in served[base.number] and pair.base_sha256 != pair.target_sha256
    ]
