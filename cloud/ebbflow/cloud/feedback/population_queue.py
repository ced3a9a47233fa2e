"""The queue of generations: what may join it, and what the workers write to the jobs they hold.

`heartbeat`, `finish`, `fail` and `stall` raise LEASE_LOST if another worker took over: stop at once, and roll back.
"""

import datetime as dt
from collections.abc import Sequence

from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import population_pb2
from ebbflow.cloud.feedback import population, round_rows
from ebbflow.cloud.registry import locks
from ebbflow.cloud.registry.queue import Queue
from ebbflow.cloud.registry.tables import Population, PopulationState, Student
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

_WAITING = (PopulationState.QUEUED, PopulationState.RUNNING)
_QUEUE = Queue(Population, PopulationState, "population", lambda job: names.population(job.student_id, job.generation))


def queue(
    session: Session, student: Student, request: population_pb2.EvolvePopulationRequest, now: dt.datetime
) -> Population:
    """Puts the next generation into the queue.

    Args:
        session: a writing transaction.
        student: whose users vote.
        request: what is wanted.
        now: the time.

    Raises:
        EbbflowError: INVALID_REQUEST for a size out of range or another student's round; ROUND_NOT_FOUND;
            STATE_CONFLICT while a generation is waiting, the round is open or asked for adapter updates, or it voted
            on anything but the newest generation or the corpus' topics.
    """
    locks.exclusive(session, f"populations of students/{student.id}")
    waiting = population.newest(session, student.id, *_WAITING)
    if waiting is not None:
        name = names.population(student.id, waiting.generation)
        raise EbbflowError(Reason.STATE_CONFLICT, f"{name} is still being made: wait for it", population=name)
    settings = population_pb2.EvolvePopulationRequest()
    settings.CopyFrom(request)
    settings.ClearField("request_id")
    settings.size = settings.size or population.DEFAULT_SIZE
    if not population.SMALLEST_SIZE <= settings.size <= population.LARGEST_SIZE:
        message = f"size must be {population.SMALLEST_SIZE} to {population.LARGEST_SIZE}, not {settings.size}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="size")
    if settings.round:
        _check_round(session, student, names.parse(settings.round, "rounds"))
    last = population.newest(session, student.id)
    row = Population(
        student_id=student.id,
        generation=last.generation + 1 if last else 1,
        state=PopulationState.QUEUED,
        settings=json_format.MessageToDict(settings),
        round_id=names.parse(settings.round, "rounds") if settings.round else None,
        create_time=now,
    )
    session.add(row)
    session.flush()
    return row


def _check_round(session: Session, student: Student, round_id: str) -> None:
    round_, name = round_rows.find(session, round_id), names.make("rounds", round_id)
    round_rows.check_closed(round_, student.id, "round")
    plan = round_rows.plan_of(round_)
    if not plan.bins:
        raise EbbflowError(Reason.STATE_CONFLICT, f"{name} asked for adapter updates and not for votes", round=name)
    voted, ready = (
        population.of_plan(session, student.id, plan.bins),
        population.newest(session, student.id, PopulationState.READY),
    )
    if voted is None:
        _check_topics(student, [bin_.bin_id for bin_ in plan.bins], name)
    elif ready is None or voted.generation != ready.generation:
        newest = names.population(student.id, ready.generation) if ready else "none"
        message = f"{name} voted on {names.population(student.id, voted.generation)}, and the newest is {newest}"
        raise EbbflowError(Reason.STATE_CONFLICT, message, round=name)


def _check_topics(student: Student, bins: Sequence[str], name: str) -> None:
    if unknown := sorted(set(bins) - set(student.topics)):
        message = f"{name} voted on {unknown[0][:80]!r}, which is neither a prompt nor a topic of students/{student.id}"
        raise EbbflowError(Reason.STATE_CONFLICT, message, round=name)


def claim(session: Session, worker: str, now: dt.datetime, lease: dt.timedelta) -> Population | None:
    """Takes the oldest generation that is queued or whose lease has run out; None if there is none."""
    return _QUEUE.claim(session, worker, now, lease)


def heartbeat(session: Session, job: Population, now: dt.datetime, lease: dt.timedelta) -> None:
    """Extends the lease."""
    _QUEUE.write(session, job, leased_until=now + lease)


def finish(session: Session, job: Population, made: population_pb2.Population) -> None:
    """Ends a job with its prompts, method, reason and parents."""
    _QUEUE.end(
        session,
        job,
        PopulationState.READY,
        prompts=[json_format.MessageToDict(prompt) for prompt in made.prompts],
        method=population_pb2.Population.Method.Name(made.method),
        reason=made.reason,
        parents=json_format.MessageToDict(made.parents) if made.HasField("parents") else {},
    )


def fail(session: Session, job: Population, reason: str) -> None:
    """Ends a job that cannot go on, with a sentence that names the cause and the cure."""
    _QUEUE.end(session, job, PopulationState.FAILED, reason=reason)


def stall(session: Session, job: Population, reason: str) -> None:
    """Says what keeps a job from going on for now; it is claimed again when its lease has run out."""
    _QUEUE.write(session, job, reason=reason)
