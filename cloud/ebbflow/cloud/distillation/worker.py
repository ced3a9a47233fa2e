"""The worker: claims a distillation, trains it, packs the release and finishes, all under one lease."""

import datetime as dt
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import torch
from sqlalchemy.orm import Session

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation.checkpoint import Checkpoints
from ebbflow.cloud.distillation.endings import Stopping, carry_through, note
from ebbflow.cloud.distillation.evolving import Evolver
from ebbflow.cloud.distillation.lease import Lease
from ebbflow.cloud.distillation.preparation import Order, Run, prepare
from ebbflow.cloud.distillation.private_accounting import Account
from ebbflow.cloud.distillation.recipe import Precision
from ebbflow.cloud.distillation.trainer import Progress
from ebbflow.cloud.registry import clock, jobs, locks
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Distillation, DistillationState, Json, Release, ReleaseState
from ebbflow.cloud.release.packing import PackedWeights, neighbour, number_files, pack_weights
from ebbflow.cloud.teacher.model import native_dtype
from ebbflow.common import names

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """Carries jobs through, one after the other.

    Attributes:
        registry: the queue.
        blobs: corpora and releases.
        folder: checkpoints and temporary files; workers that share it go on where another one ended.
        name: who holds the lease, for people.
        lease_s: seconds after which a silent worker's job is taken over.
        checkpoint_interval_s: seconds between checkpoints.
        stopping: asked after every step.
        precision: of the training products; None takes the processor's own.
    """

    registry: Registry
    blobs: BlobStore
    folder: Path
    name: str
    lease_s: float
    checkpoint_interval_s: float
    stopping: Callable[[], bool] = lambda: False
    precision: Precision | None = None

    def run_once(self) -> bool:
        """Carries the oldest waiting job through, whatever comes of it; generations of prompts, which are quick, first.

        Returns:
            False if no job was waiting.

        Raises:
            EbbflowError: DATABASE_UNAVAILABLE if the queue cannot be asked.
            Stopping: the job was given back.
        """
        evolver = Evolver(self.registry, self.blobs, self.folder, self.name, self.lease_s, self.stopping)
        if evolver.run_once():
            return True
        with self.registry.transaction() as session:
            job = jobs.claim(session, self.name, clock.now(), dt.timedelta(seconds=self.lease_s))
        if job is None:
            return False
        _log.info("distillation %s of %s: attempt %d", job.id, names.make("students", job.student_id), job.attempt)
        carry_through(
            f"distillation {job.id}",
            job.id,
            self.folder,
            lambda: self._carry(job),
            lambda words: self._fail(job, words),
            lambda words: self._stall(job, words),
            "Lower batch_size or raise gradient_accumulation.",
        )
        return True

    def sweep(self) -> None:
        """Removes what ended jobs left behind: cancelled ones, and those whose worker died after its last step."""
        found = {path.name: path for path in self.folder.iterdir()} if self.folder.exists() else {}
        if not found:
            return
        ended = (DistillationState.SUCCEEDED, DistillationState.FAILED, DistillationState.CANCELLED)
        with self.registry.reading() as session:
            query = sa.select(Distillation.id).where(Distillation.id.in_(found), Distillation.state.in_(ended))
            left = list(session.scalars(query))
        for job_id in left:
            shutil.rmtree(found[job_id], ignore_errors=True)

    def _carry(self, job: Distillation) -> None:
        with Lease(self.registry, job, self.lease_s) as lease:
            with self.registry.reading() as session:
                order = Order.read(session, job)
            folder = self.folder / job.id
            run = prepare(order, self.blobs, folder, self.precision or native_precision())
            if run.account is not None:
                self._note(job, run.account)
            checkpoints = Checkpoints(folder, run.fingerprint)
            if (state := checkpoints.load()) is not None:
                run.trainer.load_state(state)
                _log.info("distillation %s: goes on after step %d", job.id, run.trainer.step)
            self._train(run, lease, checkpoints)
            lease.tell()
            with self.registry.reading() as session:
                kept = neighbour(session, job)
            tokenizer = run.tokenizer.to_bytes()
            packed = pack_weights(
                run.trainer.student, tokenizer, self.blobs, run.probe_token_ids, folder, kept, run.kept_bf16
            )
            lease.check()
            self._finish(job, packed)
        shutil.rmtree(folder, ignore_errors=True)

    def _train(self, run: Run, lease: Lease, checkpoints: Checkpoints) -> None:
        """Trains to the end; what interrupts it finds a checkpoint."""
        saved_s = time.monotonic()

        def on_step(progress: Progress) -> None:
            nonlocal saved_s
            lease.report(progress)
            stopping = self.stopping()
            if stopping or time.monotonic() - saved_s >= self.checkpoint_interval_s:
                checkpoints.save(run.trainer.state())
                saved_s = time.monotonic()
                _log.info("%s", _line(progress))
            if stopping:
                lease.let_go()
                raise Stopping

        before = run.trainer.step
        run.trainer.run(on_step)
        if run.trainer.step > before:
            checkpoints.save(run.trainer.state())

    def _note(self, job: Distillation, account: Account) -> None:
        """Writes down what the run will cost each private text; the gate puts it on the card."""
        _log.info(
            "distillation %s: private training with noise multiplier %g: epsilon %.3f by PLD, %.3f by Opacus' PRV",
            job.id,
            account.noise_multiplier,
            account.pld_epsilon,
            account.prv_epsilon,
        )
        with self.registry.transaction() as session:
            jobs.note_private(session, job, clock.now(), {**job.private_training, **account.to_json()})

    def _finish(self, job: Distillation, packed: PackedWeights) -> None:
        """Stores the release and ends the job in one transaction, under the first number that is free."""
        while True:
            with self.registry.reading() as session:
                number = _next_number(session, job.student_id)
            targets = number_files(packed, self.blobs, job.student_id, number)
            if self._store(job, number, targets):
                _log.info("distillation %s: made %s", job.id, names.release(job.student_id, number))
                return

    def _store(self, job: Distillation, number: int, targets: dict[str, Json]) -> bool:
        """Returns False if another job of the student took the number meanwhile."""
        now = clock.now()
        with self.registry.transaction() as session:
            locks.exclusive(session, f"release numbers of {job.student_id}")
            if _next_number(session, job.student_id) != number:
                return False
            jobs.finish(session, job, now, number)
            release = Release(
                student_id=job.student_id,
                number=number,
                distillation_id=job.id,
                state=ReleaseState.PACKED,
                targets=targets,
                create_time=now,
            )
            session.add(release)
        return True

    def _stall(self, job: Distillation, words: str) -> None:
        """Leaves the job and its checkpoint for later: space can be freed, and no step shall be lost."""
        _log.warning("distillation %s: waits: %s", job.id, words)
        note(self.registry, f"distillation {job.id}", lambda session: jobs.stall(session, job, clock.now(), words))

    def _fail(self, job: Distillation, message: str) -> None:
        _log.error("distillation %s failed: %s", job.id, message)
        note(self.registry, f"distillation {job.id}", lambda session: jobs.fail(session, job, clock.now(), message))
        shutil.rmtree(self.folder / job.id, ignore_errors=True)


def _next_number(session: Session, student_id: str) -> int:
    highest = session.scalar(sa.select(sa.func.max(Release.number)).where(Release.student_id == student_id))
    return (highest or 0) + 1


def native_precision() -> Precision:
    """The precision of matrix products in which this processor is fast."""
    return "bfloat16" if native_dtype() is torch.bfloat16 else "float32"


def _line(progress: Progress) -> str:
    minutes, seconds = divmod(int(progress.eta_s), 60)
    return (
        f"step {progress.step}/{progress.steps}: loss {progress.loss:.4f} nats/token, "
        f"{progress.tokens_per_second:,.0f} tokens/s, {minutes}:{seconds:02d} left"
    )
