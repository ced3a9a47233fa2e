"""What one agent should be serving."""

import datetime as dt
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.cloud.registry.tables import (
    Agent,
    Assignment,
    DeviceState,
    Release,
    Rollout,
    RolloutDevice,
    RolloutState,
    Student,
)
from ebbflow.cloud.rollout import selector, store
from ebbflow.cloud.services.convert.common import from_json, to_json
from ebbflow.cloud.services.convert.releases import variants
from ebbflow.cloud.services.variants import choose
from ebbflow.common import names


def state(session: Session, agent_id: str) -> list[agent_pb2.DesiredRelease]:
    """Reads the desired releases of an agent: those of the students that select it now.

    A student whose every release the agent refused is named without a release, so that it is not taken for removed.
    """
    agent = session.get_one(Agent, agent_id)
    profile = from_json(agent.profile, resources_pb2.DeviceProfile)
    return [
        agent_pb2.DesiredRelease(
            student=names.make("students", release.student_id),
            release=names.release(release.student_id, release.number),
            precision=choose(variants(release.targets), profile),
            rollout=names.make("rollouts", assignment.rollout_id) if assignment.rollout_id else "",
        )
        for assignment, release in _assigned(session, agent)
    ] + [
        agent_pb2.DesiredRelease(student=names.make("students", student_id)) for student_id in _refused(session, agent)
    ]


def stale(session: Session, agent_id: str, profile: resources_pb2.DeviceProfile | None) -> bool:
    """Whether `refresh` has anything to write."""
    agent = session.get_one(Agent, agent_id)
    known = from_json(agent.profile, resources_pb2.DeviceProfile)
    return (profile is not None and profile != known) or bool(store.untold(session, agent_id))


def refresh(session: Session, agent_id: str, profile: resources_pb2.DeviceProfile | None, now: dt.datetime) -> None:
    """Keeps what the agent says of its device, and notes that it reads its desired state."""
    if profile is not None:
        session.get_one(Agent, agent_id).profile = to_json(profile)
    store.tell(session, agent_id, now)


def _assigned(session: Session, agent: Agent) -> Iterator[tuple[Assignment, Release]]:
    query = (
        sa.select(Assignment, Release, Student.selector)
        .join(
            Release,
            sa.and_(Release.student_id == Assignment.student_id, Release.number == Assignment.desired_number),
        )
        .join(Student, Student.id == Assignment.student_id)
        .where(Assignment.agent_id == agent.id)
        .order_by(Assignment.student_id)
    )
    for assignment, release, selected in session.execute(query):
        if selector.matches(selector.parse(selected), agent.labels):
            yield assignment, release


def _refused(session: Session, agent: Agent) -> Iterator[str]:
    """Students of which the agent is to serve no release, only because it refused what it was given."""
    failed = (
        sa.exists()
        .where(RolloutDevice.rollout_id == Rollout.id, RolloutDevice.agent_id == agent.id)
        .where(Rollout.student_id == Assignment.student_id, Rollout.state != RolloutState.ABORTED)
        .where(RolloutDevice.state == DeviceState.FAILED)
    )
    query = (
        sa.select(Assignment.student_id, Student.selector)
        .join(Student, Student.id == Assignment.student_id)
        .where(Assignment.agent_id == agent.id, Assignment.desired_number.is_(None), failed)
    )
    for student_id, selected in session.execute(query):
        if selector.matches(selector.parse(selected), agent.labels):
            yield student_id
