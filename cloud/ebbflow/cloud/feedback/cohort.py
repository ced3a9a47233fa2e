"""Who is asked in a round: the agents that serve the student, save those whose users may not report now.

Whether anybody uses an agent plays no part, so that taking part says nothing.
"""

import datetime as dt
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment, PrivacyEntry, Student
from ebbflow.cloud.rollout import selector
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.windows import first_report


@dataclass(frozen=True)
class Member:
    """One agent that is asked."""

    agent_id: str
    serving_number: int
    """Release of the student that it serves."""


def choose(
    session: Session, student: Student, policy: pb.PrivacyPolicy, cost_nano: int, now: dt.datetime
) -> list[Member]:
    """Returns who is asked, by id.

    Left out are new identities, because their device may have spent its users' budget under another one, and agents
    whose lifetime budget does not allow the round. Both would decline anyway.

    Args:
        session: a transaction.
        student: whose users are asked.
        policy: as signed.
        cost_nano: what the round costs, in billionths of rho.
        now: when it opens.

    Raises:
        EbbflowError: STATE_CONFLICT if no agent serves the student, IDENTITY_WAITS if all that do have to wait,
            LIFETIME_EXHAUSTED if none has budget left.
    """
    serving = _serving(session, student)
    if not serving:
        message = f"no agent serves students/{student.id} yet: start a rollout before the round"
        raise EbbflowError(Reason.STATE_CONFLICT, message, student=student.id)
    days = policy.window_days
    ready = [first_report(row.create_time, days, new_device=row.new_device) for row in serving]
    known = [Member(row.id, row.number) for row, time in zip(serving, ready, strict=True) if time <= now]
    if not known:
        message = (
            f"all agents that serve students/{student.id} ({len(serving)}) have new identities;"
            f" the first may report from {min(ready):%Y-%m-%d %H:%M} UTC on."
            " Devices that nobody used before need not wait: enrol them with `ebbflow-edge enrol --new-device`"
        )
        raise EbbflowError(Reason.IDENTITY_WAITS, message, student=student.id)
    allowed = _with_budget(session, student.id, policy.lifetime_rho_cap_nano, cost_nano)
    members = [member for member in known if allowed(member.agent_id)]
    if not members:
        message = f"no agent of students/{student.id} has budget left in all windows together"
        raise EbbflowError(Reason.LIFETIME_EXHAUSTED, message, student=student.id)
    return members


def _serving(session: Session, student: Student) -> Sequence[Any]:
    """Rows with id, create_time, new_device and number: the release that the agent serves."""
    wanted = selector.parse(student.selector)
    query = (
        sa.select(Agent.id, Agent.create_time, Agent.new_device, Assignment.serving_number.label("number"))
        .join(Assignment, Assignment.agent_id == Agent.id)
        .where(Agent.state == AgentState.ACTIVE)
        .where(Assignment.student_id == student.id, Assignment.serving_number.is_not(None))
        .where(*selector.clauses(wanted))
        .order_by(Agent.id)
    )
    return session.execute(query).all()


def _with_budget(session: Session, student_id: str, cap_nano: int, cost_nano: int) -> Callable[[str], bool]:
    """Says of an agent whether its charges of all windows, as far as the mirror knows them, leave room for another."""
    if not cap_nano:
        return lambda _agent_id: True
    query = (
        sa.select(PrivacyEntry.agent_id, sa.func.sum(PrivacyEntry.rho_nano))
        .where(PrivacyEntry.student_id == student_id)
        .group_by(PrivacyEntry.agent_id)
    )
    spent = {agent_id: int(total) for agent_id, total in session.execute(query)}
    return lambda agent_id: spent.get(agent_id, 0) + cost_nano <= cap_nano


def serving_most(members: Sequence[Member]) -> int:
    """Returns the release that most members serve; of several the newest."""
    counted = Counter(member.serving_number for member in members)
    return max(counted, key=lambda number: (counted[number], number))


def able(members: Sequence[Member], release: int, max_staleness: int) -> int:
    """How many members serve a release that a round of adapter updates takes."""
    return sum(release - max_staleness <= member.serving_number <= release for member in members)
