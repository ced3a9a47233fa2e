"""Pins: an agent that is held on one release of a student takes no part in its rollouts until it is let go.

Every function here is one step inside the caller's transaction; calling one twice does no harm.
"""

import datetime as dt

from sqlalchemy.orm import Session

from ebbflow.cloud.registry.changes import bump
from ebbflow.cloud.registry.tables import Agent, Assignment, DeviceState, Pin, Rollout, RolloutDevice, Student
from ebbflow.cloud.rollout import facts, installable, reconcile, selector, signed
from ebbflow.cloud.rollout.locking import lock
from ebbflow.cloud.rollout.state import Step
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

MOST_REASON = 1024


def pin(session: Session, agent_id: str, student_id: str, number: int, reason: str, now: dt.datetime) -> Pin:
    """Holds an agent on a release, from its next look on. A pin of the same student that it had is replaced.

    Args:
        session: the caller's transaction.
        agent_id: an agent that exists.
        student_id: the release's student.
        number: the release's number.
        reason: why, for whoever looks at the agent.
        now: the time.

    Raises:
        EbbflowError: RELEASE_NOT_FOUND, RELEASE_NOT_PUBLISHED, RELEASE_REVOKED, RELEASE_TOO_OLD; STATE_CONFLICT if the
            student is not for this agent; INVALID_REQUEST if the reason is too long.
    """
    if len(reason) > MOST_REASON:
        raise EbbflowError(Reason.INVALID_REQUEST, f"reason has at most {MOST_REASON} characters", field="reason")
    lock(session, student_id)
    installable.require(session, student_id, number)
    signed.require(session, student_id, number)
    _require_selected(session, agent_id, student_id)
    row = session.get(Pin, (agent_id, student_id), populate_existing=True)
    if row is None:
        row = Pin(agent_id=agent_id, student_id=student_id, release_number=number, reason=reason, create_time=now)
        session.add(row)
    elif (row.release_number, row.reason) != (number, reason):
        row.release_number, row.reason, row.create_time = number, reason, now
    session.flush()
    _want(session, agent_id, student_id, number, now)
    if (rollout := facts.governing(session, student_id)) is not None:
        reconcile.wake(rollout, now)
    return row


def unpin(session: Session, agent_id: str, student_id: str, now: dt.datetime) -> None:
    """Lets an agent go: it serves what the student's rollouts say, and takes part in them again.

    Where no rollout says anything it keeps the release that it was held on.
    """
    lock(session, student_id)
    row = session.get(Pin, (agent_id, student_id), populate_existing=True)
    if row is None:
        return
    session.delete(row)
    session.flush()
    rollout = facts.governing(session, student_id)
    if rollout is not None and _rejoin(session, rollout, agent_id):
        mine = RolloutDevice.agent_id == agent_id
        reconcile.change(session, rollout, lambda known: Step(known.rollout, known.devices), now, mine)
    reconcile.tick_student(session, student_id, now)


def _require_selected(session: Session, agent_id: str, student_id: str) -> None:
    agent, student = session.get_one(Agent, agent_id), session.get_one(Student, student_id)
    if not selector.matches(selector.parse(student.selector), agent.labels):
        message = f"students/{student_id} is for agents with {student.selector}, which agents/{agent_id} lacks"
        raise EbbflowError(Reason.STATE_CONFLICT, message, agent=names.make("agents", agent_id))


def _rejoin(session: Session, row: Rollout, agent_id: str) -> bool:
    """Makes a device wait for its turn again if it does not serve what the rollout brought; one that failed has failed.

    Returns:
        Whether the agent is a device of the rollout.
    """
    device = session.get(RolloutDevice, (row.id, agent_id), populate_existing=True)
    if device is None:
        return False
    assignment = session.get(Assignment, (agent_id, row.student_id), populate_existing=True)
    serves = assignment is not None and assignment.serving_number == row.release_number
    if device.state is DeviceState.ASSIGNED or (device.state is DeviceState.SUCCEEDED and not serves):
        device.state, device.reason = DeviceState.WAITING, ""
        device.not_before_time = device.assign_time = device.answer_time = None
        session.flush()
    return True


def _want(session: Session, agent_id: str, student_id: str, number: int, now: dt.datetime) -> None:
    """Tells one agent what to serve, and every replica that it should hint it."""
    row = session.get(Assignment, (agent_id, student_id), populate_existing=True)
    if row is None:
        row = Assignment(agent_id=agent_id, student_id=student_id)
        session.add(row)
    elif (row.desired_number, row.rollout_id) == (number, None):
        return
    row.desired_number, row.rollout_id, row.update_time = number, None, now
    session.flush()
    bump(session, "desired_state")
