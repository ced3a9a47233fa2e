"""The worker's second job: makes the generations of prompts that are queued, under a lease as distillations are."""

import datetime as dt
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import population_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation import corpus, likeness
from ebbflow.cloud.distillation.endings import Stopping, carry_through, note
from ebbflow.cloud.distillation.lease import Hold
from ebbflow.cloud.distillation.variation import TeacherVariator
from ebbflow.cloud.feedback import generation, population, population_queue, round_rows
from ebbflow.cloud.feedback.evolution import Votes, crowding, quality
from ebbflow.cloud.feedback.pool import Pool, Space, sample
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Json, Population, Release, Student
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

_log = logging.getLogger(__name__)

_FIRST = "the first generation is made of public texts"
_NOT_ASKED = "the teacher was not to be asked"


class PopulationHold(Hold):
    """A hold on a generation."""

    def __init__(self, registry: Registry, job: Population, lease_s: float) -> None:
        super().__init__(registry, names.population(job.student_id, job.generation), lease_s)
        self._job = job

    def _write(self, session: Session, now: dt.datetime, lease: dt.timedelta) -> None:
        population_queue.heartbeat(session, self._job, now, lease)


@dataclass(frozen=True)
class EvolutionOrder:
    """What the registry says of a generation that is to be made, read in one transaction.

    Attributes:
        student: whose it is.
        settings: what was asked for.
        generation: its number.
        release: column `targets` of the student's newest release; None before the first.
        before: the prompts that the round voted on; none if it voted on the corpus' topics, or there is no round.
        votes: what the round said of them.
        topic_weights: what the round said of the corpus' topics, if it voted on those.
    """

    student: Student
    settings: pb.EvolvePopulationRequest
    generation: int
    release: Json | None
    before: Sequence[pb.Prompt]
    votes: Votes | None
    topic_weights: dict[str, float]

    @classmethod
    def read(cls, session: Session, job: Population) -> "EvolutionOrder":
        """Looks everything up.

        Raises:
            EbbflowError: STUDENT_NOT_FOUND, ROUND_NOT_FOUND.
        """
        student = session.get(Student, job.student_id)
        if student is None:
            raise EbbflowError(Reason.STUDENT_NOT_FOUND, f"there is no {names.make('students', job.student_id)}")
        settings = json_format.ParseDict(job.settings, pb.EvolvePopulationRequest(), ignore_unknown_fields=True)
        newest = sa.select(Release).where(Release.student_id == student.id).order_by(Release.number.desc()).limit(1)
        release = session.scalars(newest).one_or_none()
        targets = release.targets if release else None
        if job.round_id is None:
            return cls(student, settings, job.generation, targets, (), None, {})
        round_ = round_rows.find(session, job.round_id)
        plan, aggregate = round_rows.plan_of(round_), round_rows.aggregate_of(round_)
        voted = population.of_plan(session, student.id, plan.bins)
        if voted is None:
            return cls(student, settings, job.generation, targets, (), None, _weights(aggregate))
        before = population.prompts_of(voted)
        return cls(student, settings, job.generation, targets, before, Votes.of(plan, aggregate), {})


def _weights(aggregate: round_pb2.Aggregate) -> dict[str, float]:
    return {bin_.bin_id: bin_.weight for bin_ in aggregate.bins} if aggregate.informative else {}


def evolve(order: EvolutionOrder, blobs: BlobStore, scratch: Path, check: Callable[[], None]) -> pb.Population:
    """Makes a generation.

    Args:
        order: what is asked for.
        blobs: corpora and releases.
        scratch: folder for temporary files.
        check: called now and then; what it raises ends the work.

    Returns:
        A message with prompts, method, reason and parents; without prompts, the reason says why there can be none.

    Raises:
        EbbflowError: BLOB_NOT_FOUND, CORPUS_INVALID, CHECKPOINT_UNREADABLE, FILE_CORRUPT.
    """
    settings = order.settings
    wanted = generation.Order(order.generation, settings.size, settings.seed)
    texts = sample(corpus.load(blobs, order.student.corpus_sha256).texts, settings.seed)
    public = [text.text for text in texts]
    space = Space(likeness.choose(settings.encoder, order.release, public, blobs, scratch, check), public)
    pool = Pool(texts, space.rows(public))
    if order.votes is None:
        prompts = generation.first(pool, wanted, order.topic_weights)
        return pb.Population(prompts=prompts, method=pb.Population.METHOD_PUBLIC_TEXTS, reason=_FIRST)
    if not order.votes.informs([prompt.topic for prompt in order.before]):
        return pb.Population(reason=_uninformative(settings.round))
    rows_NE = space.rows([prompt.text for prompt in order.before])
    variator = None if settings.public_texts_only else TeacherVariator(Teacher.load(order.student.teacher), check)
    made = generation.following(pool, space, wanted, order.before, order.votes, variator)
    if variator is None:
        made.reason = _NOT_ASKED
    made.parents.CopyFrom(quality(order.votes, crowding(rows_NE)))
    return made


def _uninformative(round_name: str) -> str:
    return (
        f"{round_name} tells nothing but noise: no prompt and no topic stands out of it."
        " Open a round on the newest generation with more agents, or make a smaller one, or allow a larger epsilon."
    )


@dataclass(frozen=True)
class Evolver:
    """Makes generations, one after the other.

    Attributes:
        registry: the queue.
        blobs: corpora and releases.
        folder: temporary files.
        name: who holds the lease, for people.
        lease_s: seconds after which a silent worker's job is taken over.
        stopping: asked now and then.
    """

    registry: Registry
    blobs: BlobStore
    folder: Path
    name: str
    lease_s: float
    stopping: Callable[[], bool] = lambda: False

    def run_once(self) -> bool:
        """Makes the oldest generation that waits, whatever comes of it.

        Returns:
            False if none was waiting.

        Raises:
            EbbflowError: DATABASE_UNAVAILABLE if the queue cannot be asked.
            Stopping: the job was given back.
        """
        with self.registry.transaction() as session:
            job = population_queue.claim(session, self.name, clock.now(), dt.timedelta(seconds=self.lease_s))
        if job is None:
            return False
        name = names.population(job.student_id, job.generation)
        _log.info("%s: attempt %d", name, job.attempt)
        carry_through(
            name,
            name,
            self.folder,
            lambda: self._carry(job),
            lambda words: self._note(job, population_queue.fail, words),
            lambda words: self._note(job, population_queue.stall, words),
            "Ask for a smaller generation, or do without the teacher.",
        )
        return True

    def _carry(self, job: Population) -> None:
        scratch = self.folder / f"population-{job.student_id}-{job.generation}"
        shutil.rmtree(scratch, ignore_errors=True)
        with PopulationHold(self.registry, job, self.lease_s) as hold:

            def check() -> None:
                if self.stopping():
                    hold.let_go()
                    raise Stopping
                hold.check()

            with self.registry.reading() as session:
                order = EvolutionOrder.read(session, job)
            try:
                made = evolve(order, self.blobs, scratch, check)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            check()
        if not made.prompts:
            self._note(job, population_queue.fail, made.reason or "the corpus has no text that can be a prompt")
            return
        with self.registry.transaction() as session:
            population_queue.finish(session, job, made)
        _log.info("%s: made %d prompts", hold.name, len(made.prompts))

    def _note(self, job: Population, write: Callable[[Session, Population, str], None], words: str) -> None:
        name = names.population(job.student_id, job.generation)
        _log.warning("%s: %s", name, words)
        note(self.registry, name, lambda session: write(session, job, words))
