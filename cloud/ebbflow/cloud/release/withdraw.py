"""Takes releases back: revoked for ever, forbidden by `min_release`, or retired because there are enough newer ones.

What is decided here is a wish in SQL, at work at once on what is desired; the signed list follows when distiller and
gate have signed it. Every function is one step inside the caller's transaction.
"""

import datetime as dt
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry import changes
from ebbflow.cloud.registry.tables import (
    Assignment,
    Distillation,
    DistillationState,
    Pin,
    Release,
    ReleaseState,
    Rollout,
    RolloutDevice,
    RolloutState,
    Student,
)
from ebbflow.cloud.release import repository
from ebbflow.cloud.rollout import store
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

KEPT: Final = 10
"""Published releases of a student that are kept unless its policy says otherwise."""

_GOING_BACK: Final = 2
"""Finished rollouts whose releases somebody may want to go back to."""
_ALIVE: Final = (RolloutState.WAITING_FOR_APPROVAL, RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.HALTED)


def revoke(session: Session, student_id: str, number: int, reason: str, now: dt.datetime) -> Release:
    """Takes a release back for ever, and steers every device away from it.

    Raises:
        EbbflowError: RELEASE_NOT_FOUND; INVALID_REQUEST without a reason.
    """
    if not reason.strip():
        raise EbbflowError(Reason.INVALID_REQUEST, "say why the release is taken back", field="reason")
    repository.lock(session)
    row = _locked(session, student_id, number)
    if row.state is not ReleaseState.REVOKED:
        row.state, row.reason, row.revoke_time = ReleaseState.REVOKED, reason[:1024], now
        session.flush()
        store.revoke(session, student_id, number, now)
        changes.bump(session, "desired_state")
    return row


def raise_min_release(session: Session, student_id: str, number: int, now: dt.datetime) -> int:
    """Forbids every release below one, for ever; those are retired, and devices are steered away from them.

    Returns:
        The lowest release that is wanted now: an earlier wish may lie above.

    Raises:
        EbbflowError: RELEASE_NOT_FOUND, RELEASE_NOT_PUBLISHED; RELEASE_REVOKED if it was taken back itself.
    """
    repository.lock(session)
    row, name = _locked(session, student_id, number), names.release(student_id, number)
    student = session.get_one(Student, student_id)
    if number <= student.min_release:
        return student.min_release
    if row.state is ReleaseState.REVOKED:
        raise EbbflowError(Reason.RELEASE_REVOKED, f"{name} was taken back itself", release=name)
    if row.state is not ReleaseState.PUBLISHED:
        message = f"{name} is {row.state.value}, not published"
        raise EbbflowError(Reason.RELEASE_NOT_PUBLISHED, message, release=name, state=row.state.value)
    student.min_release = number
    below = [release for release in _published(session, student_id) if release.number < number]
    for release in below:
        release.state = ReleaseState.RETIRED
    session.flush()
    store.revoke(session, student_id, number, now)
    changes.bump(session, "desired_state")
    return number


def retire(session: Session) -> int:
    """Retires the releases that nobody uses and that are beyond what their student's policy keeps.

    Returns:
        How many.
    """
    per_student = (
        sa.select(Release.student_id, sa.func.count())
        .where(Release.state == ReleaseState.PUBLISHED)
        .group_by(Release.student_id)
    )
    retired = 0
    for student_id, count in session.execute(per_student).all():
        policy = session.get_one(Student, student_id).rollout_policy
        kept = int(policy.get("keptReleases", 0)) or KEPT
        if count > kept:
            retired += _retire_of(session, student_id, kept)
    return retired


def _retire_of(session: Session, student_id: str, kept: int) -> int:
    repository.lock(session)
    store.lock(session, student_id)  # so that nobody begins to use one meanwhile
    session.expire_all()
    used = _used(session, student_id)
    surplus = [row for row in _published(session, student_id)[kept:] if row.number not in used]
    for row in surplus:
        row.state = ReleaseState.RETIRED
    session.flush()
    return len(surplus)


def _used(session: Session, student_id: str) -> set[int]:
    """Releases that something may still ask for."""
    of_rollouts = sa.select(Rollout.id).where(Rollout.student_id == student_id, Rollout.state.in_(_ALIVE))
    finished = sa.select(Rollout.id).where(Rollout.student_id == student_id, Rollout.state == RolloutState.SUCCEEDED)
    last = finished.order_by(Rollout.create_time.desc()).limit(_GOING_BACK)
    living = [*session.scalars(of_rollouts), *session.scalars(last)]
    going = [DistillationState.QUEUED, DistillationState.RUNNING]
    queries = (
        sa.select(Assignment.desired_number).where(Assignment.student_id == student_id),
        sa.select(Assignment.serving_number).where(Assignment.student_id == student_id),
        sa.select(Pin.release_number).where(Pin.student_id == student_id),
        sa.select(Rollout.release_number).where(Rollout.id.in_(living)),
        sa.select(RolloutDevice.previous_number).where(RolloutDevice.rollout_id.in_(living)),
        sa.select(Distillation.base_release).where(
            Distillation.student_id == student_id, Distillation.state.in_(going)
        ),
    )
    return {number for query in queries for number in session.scalars(query.distinct()) if number is not None}


def _published(session: Session, student_id: str) -> list[Release]:
    """Newest first."""
    query = sa.select(Release).where(Release.student_id == student_id, Release.state == ReleaseState.PUBLISHED)
    return list(session.scalars(query.order_by(Release.number.desc())))


def _locked(session: Session, student_id: str, number: int) -> Release:
    session.expire_all()
    row = session.get(Release, (student_id, number))
    if row is None:
        name = names.release(student_id, number)
        raise EbbflowError(Reason.RELEASE_NOT_FOUND, f"there is no {name}", release=name)
    return row
