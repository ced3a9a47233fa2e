"""A worker's hold on its job: renewed by a thread of its own, and let go at once when it is lost."""

import abc
import datetime as dt
import logging
import threading
from types import TracebackType
from typing import Self

from sqlalchemy.orm import Session

from ebbflow.cloud.distillation.trainer import Progress
from ebbflow.cloud.registry import clock, jobs
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Distillation
from ebbflow.common.errors import EbbflowError, Reason

_log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 2.0
"""Seconds between two reports of progress; leases shorter than six times that are renewed more often."""


class Hold(abc.ABC):
    """Renews a job's lease while the block runs.

    The thread beats by itself, so a long step, a slow teacher or packing does not lose the job. A registry that does
    not answer is asked again until the lease has run out.
    """

    def __init__(self, registry: Registry, name: str, lease_s: float) -> None:
        self._registry = registry
        self.name = name
        self._lease = dt.timedelta(seconds=lease_s)
        self._interval_s = min(REPORT_INTERVAL_S, lease_s / 6)
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._renewed = clock.now()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raises LEASE_LOST if the job is no longer this worker's."""
        if self._lost.is_set():
            raise EbbflowError(Reason.LEASE_LOST, f"{self.name} is no longer this worker's")

    def tell(self) -> None:
        """Writes the news down now.

        Raises:
            EbbflowError: LEASE_LOST, or what keeps the registry from answering.
        """
        self._beat(self._lease)

    def let_go(self) -> None:
        """Gives the job back, so that the next worker need not wait for the lease to run out."""
        self._ended.set()
        self._thread.join()
        self._beat(dt.timedelta(0))

    def _beat_on(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._beat(self._lease)
                self._renewed = clock.now()
            except EbbflowError as error:
                if error.reason is Reason.LEASE_LOST or clock.now() - self._renewed > self._lease:
                    self._lost.set()
                    return
                _log.warning("the lease of %s could not be renewed: %s", self.name, error.reason.name)

    def _beat(self, lease: dt.timedelta) -> None:
        now = clock.now()
        with self._registry.transaction() as session:
            self._write(session, now, lease)

    @abc.abstractmethod
    def _write(self, session: Session, now: dt.datetime, lease: dt.timedelta) -> None:
        """Extends the lease.

        Raises:
            EbbflowError: LEASE_LOST if another worker took over or somebody cancelled.
        """


class Lease(Hold):
    """A hold on a distillation, whose progress every beat tells."""

    def __init__(self, registry: Registry, job: Distillation, lease_s: float) -> None:
        super().__init__(registry, f"distillation {job.id}", lease_s)
        self._job = job
        self._progress = Progress(job.step, 0, job.loss, 0.0, 0.0, 0.0, 0.0)

    def report(self, progress: Progress) -> None:
        """Leaves news for the next beat.

        Raises:
            EbbflowError: LEASE_LOST if another worker took over or somebody cancelled.
        """
        self._progress = progress
        self.check()

    def _write(self, session: Session, now: dt.datetime, lease: dt.timedelta) -> None:
        progress = self._progress
        jobs.heartbeat(
            session,
            self._job,
            now,
            lease,
            step=progress.step,
            loss=progress.loss,
            tokens_per_second=progress.tokens_per_second,
            eta_time=now + dt.timedelta(seconds=progress.eta_s) if progress.steps else None,
        )
