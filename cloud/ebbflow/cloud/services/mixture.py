"""Which mixture a distillation trains on: what the operator says, else what a round says, else the corpus' own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from ebbflow.cloud.feedback import population, round_rows, rounds
from ebbflow.cloud.registry.tables import Round
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason


@dataclass(frozen=True)
class Resolved:
    """A mixture and what it cost the users."""

    mixture: dict[str, float] = field(default_factory=dict)
    """Share by topic; empty leaves the corpus' own proportions."""
    feedback_epsilon: float = 0.0
    """Epsilon per user and window of the round that gave it; 0 if none did."""


def explicit(wanted: Mapping[str, float], topics: Sequence[str]) -> Resolved:
    """Normalises what the operator asked for.

    Raises:
        EbbflowError: INVALID_REQUEST for a topic that the corpus lacks or a weight that is none.
    """
    for topic, weight in wanted.items():
        if topic not in topics:
            raise _wrong(f"the corpus has no topic {topic[:80]!r}")
        if not (math.isfinite(weight) and weight >= 0):
            raise _wrong(f"the weight of {topic[:80]!r} must be a number of at least 0")
    return Resolved(_normalised(wanted))


def of_round(session: Session, row: Round, student_id: str, *, alone: bool = False) -> Resolved:
    """Takes the weights that a closed round gives the bins, together with the rounds of its window before it.

    What tells nothing but noise gives none. A round on a population's prompts gives each topic the weight of its
    prompts together.

    Args:
        session: a transaction.
        row: the round.
        student_id: whose it should be.
        alone: leaves the rounds before it out.

    Raises:
        EbbflowError: INVALID_REQUEST if it is another student's round, STATE_CONFLICT while it is open.
    """
    round_rows.check_closed(row, student_id, "distillation.round")
    aggregate = round_rows.aggregate_of(row)
    if aggregate.HasField("adapter"):
        message = (
            f"{names.make('rounds', row.id)} collected adapter updates, which give no mixture: name it as adapter_round"
        )
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="distillation.round")
    if not alone:
        aggregate = rounds.of_window(session, row)
    if not aggregate.informative:
        return Resolved()
    policy = round_rows.plan_of(row).policy
    weights = [(bin_.bin_id, bin_.weight) for bin_ in aggregate.bins]
    return Resolved(_normalised(population.topic_weights(session, row, weights)), policy.epsilon)


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    if total <= 0:
        raise _wrong("the mixture gives no topic any weight")
    return {topic: weight / total for topic, weight in weights.items() if weight > 0}


def _wrong(message: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, message, field="distillation.mixture")
