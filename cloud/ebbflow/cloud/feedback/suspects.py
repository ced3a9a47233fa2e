"""Agents whose null bins of several rounds together hold too little noise.

One batch of 64 null bins shows half of sigma, and misses sigma/1.2. Fifteen batches together show that too.
"""

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.feedback import nulls
from ebbflow.cloud.feedback.round_rows import plan_of
from ebbflow.cloud.registry.tables import FeedbackBatch, FeedbackRefusal, Round
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.checks import Refusal

POOLED_ROUNDS = 15
"""Rounds of a student that are looked at together: 960 null bins."""
REFUSED_ROUNDS = 2
"""In so many of these a batch was refused as under-noised: a correct agent has that once in ten thousand million."""


def under_noised(session: Session, round_: Round) -> set[str]:
    """Returns the agents of a round whose noise of the last rounds together is too small.

    A correct agent is among them once in a million rounds for each variance that its plans asked for.

    Args:
        session: a transaction.
        round_: the round; its own batches count too. Batches beyond their retention do not.
    """
    rounds = sa.select(Round).where(Round.student_id == round_.student_id, Round.create_time <= round_.create_time)
    pooled = session.scalars(rounds.order_by(Round.create_time.desc(), Round.id.desc()).limit(POOLED_ROUNDS)).all()
    found: dict[tuple[str, Fraction], nulls.Tally] = defaultdict(nulls.Tally)
    for row in pooled:
        plan = plan_of(row)
        variance = variance_of(plan.mechanism)
        query = sa.select(FeedbackBatch.agent_id, FeedbackBatch.noisy).where(FeedbackBatch.round_id == row.id)
        for agent_id, noisy in session.execute(query.execution_options(yield_per=500)):
            if noisy:
                found[agent_id, variance].add(noisy[-plan.null_bins :])
    members = set(session.scalars(sa.select(FeedbackBatch.agent_id).where(FeedbackBatch.round_id == round_.id)))
    suspects = _often_refused(session, [row.id for row in pooled])
    suspects.update(agent_id for (agent_id, variance), tally in found.items() if nulls.is_too_small(tally, variance))
    return suspects & members


def _often_refused(session: Session, round_ids: Sequence[str]) -> set[str]:
    """Agents whose noise was too small for a single batch in several rounds: the batch that passed was luck."""
    query = (
        sa.select(FeedbackRefusal.agent_id)
        .where(FeedbackRefusal.round_id.in_(round_ids), FeedbackRefusal.reason == Refusal.UNDER_NOISED.value)
        .group_by(FeedbackRefusal.agent_id)
        .having(sa.func.count(FeedbackRefusal.round_id.distinct()) >= REFUSED_ROUNDS)
    )
    return set(session.scalars(query))
