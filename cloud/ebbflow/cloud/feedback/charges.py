"""What the cloud knows of one agent's charges, so that the agent can take over those that its own account lacks."""

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.round_rows import plan_of
from ebbflow.cloud.registry.tables import FeedbackRefusal, PrivacyEntry, Round, RoundMember
from ebbflow.common import names


def known(session: Session, agent_id: str) -> list[pb.MirroredCharge]:
    """Returns every charge of an agent, each round once, in the order in which the rounds end.

    A batch that was refused was charged all the same: the device charges before it sends, and what was sent has left.
    Refusals in rounds that did not ask the agent cost nothing, because the device answers none of their plans.

    Args:
        session: a reading transaction.
        agent_id: from the peer's certificate.
    """
    found = [*_kept(session, agent_id), *_refused(session, agent_id)]
    return sorted(found, key=lambda charge: (charge.end_time.seconds, charge.end_time.nanos, charge.round))


def _kept(session: Session, agent_id: str) -> list[pb.MirroredCharge]:
    query = (
        sa.select(PrivacyEntry, Round.end_time)
        .join(Round, Round.id == PrivacyEntry.round_id)
        .where(PrivacyEntry.agent_id == agent_id)
    )
    return [
        _charge(entry.round_id, entry.student_id, entry.window, entry.rho_nano, end_time)
        for entry, end_time in session.execute(query)
    ]


def _refused(session: Session, agent_id: str) -> list[pb.MirroredCharge]:
    same = sa.and_(RoundMember.round_id == FeedbackRefusal.round_id, RoundMember.agent_id == FeedbackRefusal.agent_id)
    refused = sa.select(FeedbackRefusal.round_id).join(RoundMember, same).where(FeedbackRefusal.agent_id == agent_id)
    kept = sa.select(PrivacyEntry.round_id).where(PrivacyEntry.agent_id == agent_id)
    query = sa.select(Round).where(Round.id.in_(refused), Round.id.not_in(kept))
    return [
        _charge(row.id, row.student_id, row.window, plan_of(row).mechanism.rho_nano, row.end_time)
        for row in session.scalars(query)
    ]


def _charge(round_id: str, student_id: str, window: str, rho_nano: int, end_time: dt.datetime) -> pb.MirroredCharge:
    charge = pb.MirroredCharge(
        round=names.make("rounds", round_id),
        student=names.make("students", student_id),
        window=window,
        rho_nano=rho_nano,
    )
    charge.end_time.FromDatetime(end_time)
    return charge
