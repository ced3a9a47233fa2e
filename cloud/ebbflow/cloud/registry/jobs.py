"""The queue of distillations: what the workers write to the jobs they hold.

All but `claim` raise LEASE_LOST if another worker took over or somebody cancelled: stop at once, and roll back.
"""

import datetime as dt

from sqlalchemy.orm import Session

from ebbflow.cloud.registry.queue import Queue
from ebbflow.cloud.registry.tables import Distillation, DistillationState, Json

_QUEUE = Queue(Distillation, DistillationState, "distillation", lambda job: job.id)


def claim(session: Session, worker: str, now: dt.datetime, lease: dt.timedelta) -> Distillation | None:
    """Takes the oldest distillation that is queued or whose lease has run out; None if there is none."""
    return _QUEUE.claim(session, worker, now, lease, error="", update_time=now)


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
    """Extends the lease and tells how far the job is."""
    progress = {"step": step, "loss": loss, "tokens_per_second": tokens_per_second, "eta_time": eta_time}
    _QUEUE.write(session, job, leased_until=now + lease, update_time=now, **progress)


def finish(session: Session, job: Distillation, now: dt.datetime, release_number: int) -> None:
    """Ends a job with its release, in the transaction that stores the release."""
    _QUEUE.end(session, job, DistillationState.SUCCEEDED, release_number=release_number, eta_time=None, update_time=now)


def note_private(session: Session, job: Distillation, now: dt.datetime, training: Json) -> None:
    """Writes down what private training costs, before its first step."""
    _QUEUE.write(session, job, private_training=training, update_time=now)


def stall(session: Session, job: Distillation, now: dt.datetime, error: str) -> None:
    """Says what keeps a job from going on for now; it is claimed again when its lease has run out."""
    _QUEUE.write(session, job, error=error, eta_time=None, update_time=now)


def fail(session: Session, job: Distillation, now: dt.datetime, error: str) -> None:
    """Ends a job that cannot go on, with a sentence that names the cause and the cure."""
    _QUEUE.end(session, job, DistillationState.FAILED, error=error, eta_time=None, update_time=now)
