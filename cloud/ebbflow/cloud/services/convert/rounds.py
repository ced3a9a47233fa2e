"""Rounds."""

from dataclasses import dataclass

from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback.round_rows import aggregate_of, plan_of
from ebbflow.cloud.registry.tables import Round, RoundState
from ebbflow.cloud.services.convert.common import timestamp
from ebbflow.common import names

STATES = {RoundState.OPEN: round_pb2.Round.STATE_OPEN, RoundState.CLOSED: round_pb2.Round.STATE_CLOSED}


@dataclass(frozen=True)
class Counts:
    """How a round's collection stands."""

    cohort: int = 0
    accepted: int = 0
    refused: int = 0


def round_(row: Round, counts: Counts) -> round_pb2.Round:
    """A round."""
    return round_pb2.Round(
        name=names.make("rounds", row.id),
        state=STATES[row.state],
        plan=plan_of(row),
        cohort_size=counts.cohort,
        batches_accepted=counts.accepted,
        batches_refused=counts.refused,
        aggregate=aggregate_of(row) if row.aggregate else None,
        create_time=timestamp(row.create_time),
    )
