"""Work queues: a table whose rows wait, are leased and end, with one claiming statement.

A lease lets a dead worker's job be taken over; the attempt number, which every claim raises, fences what the old worker
may still try to write.
"""

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import Distillation, DistillationState, Population, PopulationState
from ebbflow.common.errors import EbbflowError, Reason

LONGEST_LEASE = dt.timedelta(days=1)
"""No lease in use ends later than this, or than twice the asking worker's own where that is more.

Workers renew every few seconds a lease of one minute, unless the setting `lease_s` says otherwise. One that ends later
was written by a clock that ran ahead, or the asking one is behind; without a limit nobody would take the job over until
that far time, though its worker has died. A day is beyond every sensible `lease_s` and every wrong time zone, and twice
the own lease lets alone those of workers whose `lease_s` is longer still. If the holder lives after all, the attempt
number fences it like any other whose job was taken over: work is done twice, and nothing is written twice.
"""

Job = TypeVar("Job", Distillation, Population)


@dataclass(frozen=True)
class Queue(Generic[Job]):
    """A table as a queue.

    Attributes:
        table: its class.
        states: of its rows.
        kind: what a job is, in errors.
        name: what a job is called there.
    """

    table: type[Job]
    states: type[DistillationState] | type[PopulationState]
    kind: str
    name: Callable[[Job], str]

    def claim(
        self, session: Session, worker: str, now: dt.datetime, lease: dt.timedelta, **values: object
    ) -> Job | None:
        """Takes the oldest job that is queued or whose lease has run out, or cannot be right; None if there is none.

        Args:
            session: a writing transaction.
            worker: who takes it, for people.
            now: the time.
            lease: how long it is the worker's.
            values: of other columns, written with the lease.
        """
        table, keys = self.table, sa.inspect(self.table).primary_key
        over = sa.or_(table.leased_until < now, table.leased_until > now + max(LONGEST_LEASE, 2 * lease))
        abandoned = sa.and_(table.state == self.states.RUNNING, over)
        pick = (
            sa.select(*keys)
            .where(sa.or_(table.state == self.states.QUEUED, abandoned))
            .order_by(table.create_time, *keys)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        taken = {"state": self.states.RUNNING, "leased_by": worker, "leased_until": now + lease}
        take = (
            sa.update(table)
            .where(sa.tuple_(*keys) == pick)  # never IN, for which PostgreSQL may pick, and lock, once a row
            .values(attempt=table.attempt + 1, **taken, **values)
            .returning(table)
            .execution_options(synchronize_session=False)
        )
        return session.scalars(take).one_or_none()

    def write(self, session: Session, job: Job, **values: object) -> None:
        """Writes to a job as it was claimed.

        Raises:
            EbbflowError: LEASE_LOST if it is another worker's meanwhile, or nobody's.
        """
        table = self.table
        same = [key == getattr(job, key.name) for key in sa.inspect(table).primary_key]
        done = session.execute(
            sa.update(table)
            .where(*same, table.state == self.states.RUNNING, table.attempt == job.attempt)
            .values(**values)
            .execution_options(synchronize_session=False)
        )
        if done.rowcount != 1:  # type: ignore[attr-defined]
            name = self.name(job)
            message = f"{self.kind} {name} is no longer this worker's"
            raise EbbflowError(Reason.LEASE_LOST, message, **{self.kind: name})

    def end(self, session: Session, job: Job, state: DistillationState | PopulationState, **values: object) -> None:
        """Ends a job as it was claimed.

        Raises:
            EbbflowError: LEASE_LOST if it is another worker's meanwhile, or nobody's.
        """
        self.write(session, job, state=state, leased_by=None, leased_until=None, **values)
