"""The workers' queue: the distillations table and one claiming statement.

A lease lets a dead worker's job be taken over; the attempt number, which every claim raises, fences what the old worker
may still try to write.
"""

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import Distillation, DistillationState, Json
from ebbflow.common.errors import EbbflowError, Reason


def claim(session: Session, worker: str, now: dt.datetime, lease: dt.timedelta) -> Distillation | None:
    """Takes the oldest distillation that is queued or whose lease has run out; None if there is none."""
    abandoned = sa.and_(Distillation.state == DistillationState.RUNNING, Distillation.leased_until < now)
    pick = (
        sa.select(Distillation.id)
        .where(sa.or_(Distillation.state == DistillationState.QUEUED, abandoned))
        .order_by(Distillation.create_time, Distillation.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    take = (
        sa.update(Distillation)
        .where(Distillation.id == pick)
        .values(
            state=DistillationState.RUNNING,
            leased_by=worker,
            leased_until=now + lease,
            attempt=Distillation.attempt + 1,
            error="",
            update_time=now,
        )
        .returning(Distillation)
        .execution_options(synchronize_session=False)
    )
    return session.scalars(take).one_or_none()


def heartbeat(
    session: Session,
    job: Distillation,
    now: dt.datetime,
    lease: dt.timedelta,
    *,
    step: int,
    loss: float,
    tokens_per_second: float,
    eta_time: dt.datetime | None,
) -> None:
    """Extends the lease and tells how far the job is.

    Raises:
        EbbflowError: LEASE_LOST if another worker took over or somebody cancelled; stop at once.
    """
    _fenced(
        session,
        job,
        leased_until=now + lease,
        update_time=now,
        step=step,
        loss=loss,
        tokens_per_second=tokens_per_second,
        eta_time=eta_time,
    )


def finish(session: Session, job: Distillation, now: dt.datetime, release_number: int) -> None:
    """Ends a job with its release, in the transaction that stores the release.

    Raises:
        EbbflowError: LEASE_LOST if another worker took over or somebody cancelled; roll back.
    """
    _fenced(
        session,
        job,
        state=DistillationState.SUCCEEDED,
        release_number=release_number,
        leased_by=None,
        leased_until=None,
        eta_time=None,
        update_time=now,
    )


def note_private(session: Session, job: Distillation, now: dt.datetime, training: Json) -> None:
    """Writes down what private training costs, before its first step.

    Raises:
        EbbflowError: LEASE_LOST if another worker took over or somebody cancelled; stop at once.
    """
    _fenced(session, job, private_training=training, update_time=now)


def stall(session: Session, job: Distillation, now: dt.datetime, error: str) -> None:
    """Says what keeps a job from going on for now; it is claimed again when its lease has run out.

    Raises:
        EbbflowError: LEASE_LOST if another worker took over or somebody cancelled.
    """
    _fenced(session, job, error=error, eta_time=None, update_time=now)


def fail(session: Session, job: Distillation, now: dt.datetime, error: str) -> None:
    """Ends a job that cannot go on, with a sentence that names the cause and the cure.

    Raises:
        EbbflowError: LEASE_LOST if another worker took over or somebody cancelled.
    """
    _fenced(
        session,
        job,
        state=DistillationState.FAILED,
        error=error,
        leased_by=None,
        leased_until=None,
        eta_time=None,
        update_time=now,
    )


def _fenced(session: Session, job: Distillation, **values: object) -> None:
    done = session.execute(
        sa.update(Distillation)
        .where(
            Distillation.id == job.id,
            Distillation.state == DistillationState.RUNNING,
            Distillation.attempt == job.attempt,
        )
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    if done.rowcount != 1:  # type: ignore[attr-defined]
        message = f"distillation {job.id} is no longer this worker's"
        raise EbbflowError(Reason.LEASE_LOST, message, distillation=job.id)
