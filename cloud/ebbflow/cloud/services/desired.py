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
    Pin,
    Release,
    ReleaseState,
    Rollout,
    RolloutDevice,
    RolloutState,
    Student,
)
from ebbflow.cloud.rollout import selector, store
from ebbflow.cloud.services.convert.common import from_json, timestamp, to_json
from ebbflow.cloud.services.convert.releases import variants
from ebbflow.cloud.services.variants import choose
from ebbflow.common import names

_PINNED = sa.and_(Pin.agent_id == Assignment.agent_id, Pin.student_id == Assignment.student_id)
_NUMBER = sa.func.coalesce(Pin.release_number, Assignment.desired_number)
"""The release to serve: a pin's, whatever a rollout says."""


def state(session: Session, agent_id: str) -> list[agent_pb2.DesiredRelease]:
    """Reads the desired releases of an agent: those of the students that select it now. A revoked one is never desired.

    A student is named without a release, so that it is not taken for removed, if the agent refused every release that
    it was given, or if the one that it serves was taken back and there is no other.
    """
    agent = session.get_one(Agent, agent_id)
    profile = from_json(agent.profile, resources_pb2.DeviceProfile)
    return [
        agent_pb2.DesiredRelease(
            student=names.make("students", release.student_id),
            release=names.release(release.student_id, release.number),
            precision=choose(variants(release.targets), profile),
            rollout=names.make("rollouts", rollout_id) if rollout_id else "",
            not_before_time=timestamp(not_before_time),
        )
        for release, rollout_id, not_before_time in _assigned(session, agent)
    ] + [agent_pb2.DesiredRelease(student=names.make("students", student_id)) for student_id in _kept(session, agent)]


def stale(session: Session, agent_id: str, profile: resources_pb2.DeviceProfile | None, now: dt.datetime) -> bool:
    """Whether `refresh` has anything to write."""
    agent = session.get_one(Agent, agent_id)
    known = from_json(agent.profile, resources_pb2.DeviceProfile)
    return (profile is not None and profile != known) or bool(store.untold(session, agent_id, now))


def refresh(session: Session, agent_id: str, profile: resources_pb2.DeviceProfile | None, now: dt.datetime) -> None:
    """Keeps what the agent says of its device, and notes that it reads its desired state."""
    if profile is not None:
        session.get_one(Agent, agent_id).profile = to_json(profile)
    store.tell(session, agent_id, now)


def _assigned(session: Session, agent: Agent) -> Iterator[tuple[Release, str | None, dt.datetime | None]]:
    """Releases to serve, each with the rollout that brings it and the time before which not to fetch."""
    brought = sa.and_(RolloutDevice.rollout_id == Assignment.rollout_id, RolloutDevice.agent_id == agent.id)
    query = (
        sa.select(Release, Assignment.rollout_id, RolloutDevice.not_before_time, Pin.agent_id, Student.selector)
        .select_from(Assignment)
        .outerjoin(Pin, _PINNED)
        .join(Release, sa.and_(Release.student_id == Assignment.student_id, Release.number == _NUMBER))
        .join(Student, Student.id == Assignment.student_id)
        .outerjoin(RolloutDevice, brought)
        .where(Assignment.agent_id == agent.id, Release.state != ReleaseState.REVOKED)
        .order_by(Assignment.student_id)
    )
    for release, rollout_id, not_before_time, pinned, selected in session.execute(query):
        if selector.matches(selector.parse(selected), agent.labels):
            yield (release, None, None) if pinned else (release, rollout_id, not_before_time)


def _kept(session: Session, agent: Agent) -> Iterator[str]:
    """Students of which the agent is to keep what it serves: it refused what it was given, or that was taken back."""
    failed = (
        sa.exists()
        .where(RolloutDevice.rollout_id == Rollout.id, RolloutDevice.agent_id == agent.id)
        .where(Rollout.student_id == Assignment.student_id, Rollout.state != RolloutState.ABORTED)
        .where(RolloutDevice.state == DeviceState.FAILED)
    )
    forbidden = (
        sa.exists()
        .where(Release.student_id == Assignment.student_id, Release.number.in_([_NUMBER, Assignment.serving_number]))
        .where(sa.or_(Release.state != ReleaseState.PUBLISHED, Release.number < Student.min_release))
    )
    allowed = (
        sa.exists()
        .where(Release.student_id == Assignment.student_id, Release.number == _NUMBER)
        .where(Release.state != ReleaseState.REVOKED)
    )
    query = (
        sa.select(Assignment.student_id, Student.selector)
        .join(Student, Student.id == Assignment.student_id)
        .outerjoin(Pin, _PINNED)
        .where(Assignment.agent_id == agent.id, ~allowed, sa.or_(failed, forbidden))
        .order_by(Assignment.student_id)
    )
    for student_id, selected in session.execute(query):
        if selector.matches(selector.parse(selected), agent.labels):
            yield student_id
