"""Which releases devices may still be told to serve, and what takes the place of one that they may not."""

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.changes import bump
from ebbflow.cloud.registry.tables import Assignment, Pin, Release, ReleaseState, Rollout, RolloutState, Student
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason


def allowed(session: Session, student_id: str) -> frozenset[int]:
    """Releases of a student that are published, not revoked or retired, and not below its lowest one."""
    least = sa.select(Student.min_release).where(Student.id == student_id).scalar_subquery()
    query = sa.select(Release.number).where(
        Release.student_id == student_id, Release.state == ReleaseState.PUBLISHED, Release.number >= least
    )
    return frozenset(session.scalars(query))


def require(session: Session, student_id: str, number: int) -> None:
    """Refuses a release that no device would take.

    Raises:
        EbbflowError: RELEASE_NOT_FOUND, RELEASE_REVOKED, RELEASE_NOT_PUBLISHED or RELEASE_TOO_OLD.
    """
    release, name = session.get(Release, (student_id, number)), names.release(student_id, number)
    if release is None:
        raise EbbflowError(Reason.RELEASE_NOT_FOUND, f"there is no {name}", release=name)
    if release.state is ReleaseState.REVOKED:
        raise EbbflowError(Reason.RELEASE_REVOKED, f"{name} was revoked", release=name)
    if release.state is not ReleaseState.PUBLISHED:
        message = f"{name} is {release.state.value}, not published"
        raise EbbflowError(Reason.RELEASE_NOT_PUBLISHED, message, release=name, state=release.state.value)
    least = session.get_one(Student, student_id).min_release
    if number < least:
        message = f"{name} is below the student's lowest release, {least}"
        raise EbbflowError(Reason.RELEASE_TOO_OLD, message, release=name, min_release=least)


def proven(session: Session, student_id: str, among: frozenset[int], besides: int | None = None) -> int | None:
    """The release of the newest rollout that succeeded or rolled back, of those that may be installed; or None."""
    query = sa.select(Rollout.release_number).where(
        Rollout.student_id == student_id,
        sa.or_(Rollout.state == RolloutState.SUCCEEDED, Rollout.rolls_back),
        Rollout.release_number.in_(among - {besides}),
    )
    return session.scalars(query.order_by(Rollout.ordinal.desc()).limit(1)).first()


def sweep(session: Session, student_id: str, now: dt.datetime) -> int:
    """Moves assignments and pins away from releases that may no longer be installed, whatever brought them there.

    They move to the newest proven release, or to none; a pin that has nowhere to go is lifted.

    Returns:
        Number of agents whose desired release changed.
    """
    mine = Assignment.student_id == student_id, Assignment.desired_number.is_not(None)
    told = set(session.scalars(sa.select(Assignment.desired_number).where(*mine).distinct()))
    held = set(session.scalars(sa.select(Pin.release_number).where(Pin.student_id == student_id).distinct()))
    if not told and not held:
        return 0
    among = allowed(session, student_id)
    wrong = (told | held) - among
    if not wrong:
        return 0
    instead = proven(session, student_id, among)
    pins = Pin.student_id == student_id, Pin.release_number.in_(wrong)
    session.execute(
        sa.delete(Pin).where(*pins) if instead is None else sa.update(Pin).where(*pins).values(release_number=instead)
    )
    moved = session.execute(
        sa.update(Assignment)
        .where(*mine, Assignment.desired_number.in_(wrong))
        .values(desired_number=instead, rollout_id=None, update_time=now)
    )
    bump(session, "desired_state")
    return int(moved.rowcount)  # type: ignore[attr-defined]


def hold(session: Session, student_id: str, now: dt.datetime) -> int:
    """Tells pinned agents the release that they are held on, whatever they were told before.

    Returns:
        Number of agents whose desired release changed.
    """
    mine = sa.and_(Pin.agent_id == Assignment.agent_id, Pin.student_id == Assignment.student_id)
    wrong = Assignment.desired_number.is_distinct_from(Pin.release_number)
    query = sa.select(Assignment, Pin.release_number).join(Pin, mine).where(Assignment.student_id == student_id, wrong)
    found = session.execute(query.execution_options(populate_existing=True)).all()
    for assignment, number in found:
        assignment.desired_number, assignment.rollout_id, assignment.update_time = number, None, now
    if found:
        session.flush()
        bump(session, "desired_state")
    return len(found)
