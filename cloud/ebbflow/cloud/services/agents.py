"""Agents as admins see them: row, assignments, pins and certificates together."""

from collections import defaultdict
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import fleet_pb2 as pb
from ebbflow.cloud.registry.tables import Agent, Assignment, Certificate, Pin
from ebbflow.cloud.services.convert import fleet
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

NO_KEY = {"key_share": True}
"""Locks a row for a change that keeps its key, so that rows which refer to it can still be written."""


def find(session: Session, agent_id: str, *, lock: bool = False) -> Agent:
    """Returns an agent, and keeps others from changing it until the transaction ends if `lock` is set.

    Raises:
        EbbflowError: AGENT_NOT_FOUND.
    """
    row = session.get(Agent, agent_id, with_for_update=NO_KEY if lock else None)
    if row is None:
        name = names.make("agents", agent_id)
        raise EbbflowError(Reason.AGENT_NOT_FOUND, f"there is no {name}", agent=name)
    return row


def message(session: Session, agent_id: str) -> pb.Agent:
    """Returns one agent.

    Raises:
        EbbflowError: AGENT_NOT_FOUND.
    """
    (found,) = messages(session, [find(session, agent_id)])
    return found


def messages(session: Session, rows: Sequence[Agent]) -> list[pb.Agent]:
    """Returns many agents with three queries more than their rows took."""
    ids = [row.id for row in rows]
    assignments, pins = defaultdict[str, list[Assignment]](list), defaultdict[str, list[Pin]](list)
    for assignment in session.scalars(
        sa.select(Assignment).where(Assignment.agent_id.in_(ids)).order_by(Assignment.student_id)
    ):
        assignments[assignment.agent_id].append(assignment)
    for pin in session.scalars(sa.select(Pin).where(Pin.agent_id.in_(ids)).order_by(Pin.student_id)):
        pins[pin.agent_id].append(pin)
    newest = (
        sa.select(Certificate.subject, sa.func.max(Certificate.expire_time).label("expire_time"))
        .where(Certificate.subject.in_([names.make("agents", id_) for id_ in ids]), Certificate.revoke_time.is_(None))
        .group_by(Certificate.subject)
    )
    expiry = {found.subject: found.expire_time for found in session.execute(newest)}
    return [
        fleet.agent(row, assignments[row.id], pins[row.id], expiry.get(names.make("agents", row.id))) for row in rows
    ]
