"""Populations."""

from ebbflow.api.v1 import population_pb2 as pb
from ebbflow.cloud.feedback.population import prompts_of
from ebbflow.cloud.registry.tables import Population, PopulationState
from ebbflow.cloud.services.convert.common import from_json, timestamp
from ebbflow.common import names

STATES = {
    PopulationState.QUEUED: pb.Population.STATE_QUEUED,
    PopulationState.RUNNING: pb.Population.STATE_QUEUED,
    PopulationState.READY: pb.Population.STATE_READY,
    PopulationState.FAILED: pb.Population.STATE_FAILED,
}


def population(row: Population, *, prompts: bool = True) -> pb.Population:
    """A generation.

    Args:
        row: as the registry keeps it.
        prompts: whether its prompts are wanted.
    """
    return pb.Population(
        name=names.population(row.student_id, row.generation),
        state=STATES[row.state],
        prompts=prompts_of(row) if prompts else [],
        round=names.make("rounds", row.round_id) if row.round_id else "",
        method=pb.Population.Method.Value(row.method or "METHOD_UNSPECIFIED"),
        reason=row.reason,
        parents=from_json(row.parents, pb.Quality) if row.parents else None,
        create_time=timestamp(row.create_time),
    )
