"""Populations: generations of prompts that a student's users vote on, and what a round on them says.

Everything here is public texts, synthetic ones, or post-processing of privatised sums.
"""

import re
from collections.abc import Sequence

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import population_pb2
from ebbflow.cloud.feedback import round_rows
from ebbflow.cloud.feedback.evolution import by_topic
from ebbflow.cloud.feedback.plans import TEXT_CHARACTERS
from ebbflow.cloud.registry.tables import Population, PopulationState, Round
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.plans import MAX_BINS

DEFAULT_SIZE = 64
SMALLEST_SIZE = 4
LARGEST_SIZE = MAX_BINS

_PROMPT_ID = re.compile(r"([1-9][0-9]{0,9})-(?:0|[1-9][0-9]{0,9})")


def prompt_id(generation: int, number: int) -> str:
    """Identifier of a generation's prompt, unique in the student."""
    return f"{generation}-{number}"


def find(session: Session, student_id: str, generation: int) -> Population:
    """Returns a generation, whatever its state.

    Raises:
        EbbflowError: POPULATION_NOT_FOUND.
    """
    row = session.get(Population, (student_id, generation))
    if row is None:
        name = names.population(student_id, generation)
        raise EbbflowError(Reason.POPULATION_NOT_FOUND, f"there is no {name}", population=name)
    return row


def newest(session: Session, student_id: str, *states: PopulationState) -> Population | None:
    """Returns the newest generation in one of some states, or None; without states of any."""
    query = sa.select(Population).where(Population.student_id == student_id)
    if states:
        query = query.where(Population.state.in_(states))
    return session.scalars(query.order_by(Population.generation.desc()).limit(1)).one_or_none()


def find_ready(session: Session, student_id: str, generation: int) -> Population:
    """Returns a generation whose prompts are there.

    Raises:
        EbbflowError: POPULATION_NOT_FOUND; STATE_CONFLICT while it is made, or if it could not be.
    """
    row = find(session, student_id, generation)
    if row.state is not PopulationState.READY:
        name = names.population(student_id, generation)
        why = f": {row.reason}" if row.state is PopulationState.FAILED and row.reason else ""
        message = f"{name} has no prompts: it is {row.state.value}{why}"
        raise EbbflowError(Reason.STATE_CONFLICT, message, population=name)
    return row


def prompts_of(row: Population) -> list[population_pb2.Prompt]:
    """Returns the prompts of a generation; none before it is ready."""
    return [
        json_format.ParseDict(prompt, population_pb2.Prompt(), ignore_unknown_fields=True) for prompt in row.prompts
    ]


def bins(session: Session, student_id: str, generation: int) -> list[pb.Bin]:
    """Makes one bin of each prompt, for a round that votes on them.

    Raises:
        EbbflowError: POPULATION_NOT_FOUND; STATE_CONFLICT if it is not ready.
    """
    row = find_ready(session, student_id, generation)
    return [pb.Bin(bin_id=prompt.prompt_id, texts=[prompt.text[:TEXT_CHARACTERS]]) for prompt in prompts_of(row)]


def of_plan(session: Session, student_id: str, bins: Sequence[pb.Bin]) -> Population | None:
    """Returns the generation whose prompts are the bins of a plan; None if they are the corpus' topics."""
    match = _PROMPT_ID.fullmatch(bins[0].bin_id) if bins else None
    row = session.get(Population, (student_id, int(match[1]))) if match else None
    if row is None or [prompt.prompt_id for prompt in prompts_of(row)] != [bin_.bin_id for bin_ in bins]:
        return None
    return row


def topic_weights(session: Session, round_: Round, weights: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Turns a closed round's weights by bin into weights by topic of the corpus.

    Args:
        session: a reading transaction.
        round_: on topics or on a generation's prompts.
        weights: bin id and share, for every bin.

    Returns:
        The weights as they are if the bins are topics; otherwise those of each topic's prompts together.
    """
    row = of_plan(session, round_.student_id, round_rows.plan_of(round_).bins)
    if row is None:
        return dict(weights)
    topics = {prompt.prompt_id: prompt.topic for prompt in prompts_of(row)}
    return by_topic([weight for _, weight in weights], [topics[bin_id] for bin_id, _ in weights])


def epsilon(session: Session, student_id: str, generation: int) -> float:
    """Returns the largest epsilon, per user and window, of the policies of the rounds that led to a generation.

    Zero if no round did: then the generation is public texts alone.

    Raises:
        EbbflowError: POPULATION_NOT_FOUND.
    """
    most, row = 0.0, find(session, student_id, generation)
    while row.round_id is not None:
        plan = round_rows.plan_of(round_rows.find(session, row.round_id))
        most = max(most, plan.policy.epsilon)
        before = of_plan(session, student_id, plan.bins)
        if before is None or before.generation >= row.generation:
            break
        row = before
    return most
