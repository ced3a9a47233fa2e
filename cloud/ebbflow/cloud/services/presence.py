"""What the registry knows of live agents: who holds the line, when it was heard, and whether two are one too many."""

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.cloud.registry.changes import bump
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment
from ebbflow.cloud.services import audit
from ebbflow.cloud.services.agents import NO_KEY
from ebbflow.cloud.services.call import Call
from ebbflow.cloud.services.convert.common import to_json
from ebbflow.common import names

CLONED = "two live processes used this identity"
STALE_AFTER_BEATS = 3
_CHUNK = 500


@dataclass(frozen=True)
class Beat:
    """A heartbeat, waiting to be written with others."""

    instance_id: str
    time: dt.datetime
    telemetry: agent_pb2.Telemetry


def take_line(
    session: Session, agent_id: str, instance_id: str, profile: resources_pb2.DeviceProfile | None, now: dt.datetime
) -> str | None:
    """Makes a process the holder of its agent's line; returns the holder before it."""
    agent = session.get_one(Agent, agent_id, with_for_update=NO_KEY)
    before, agent.instance_id = agent.instance_id, instance_id
    agent.connected, agent.last_seen_time = True, now
    if profile is not None:
        agent.profile = to_json(profile)
    return before


@dataclass
class Written:
    """What came of writing heartbeats."""

    cloned: list[str] = field(default_factory=list)
    """Agents whose identity another process holds by now: the beat came after the holder was last heard."""
    news: list[str] = field(default_factory=list)
    """Agents that tell of other installations than in the beat before."""


def write_beats(session: Session, beats: Mapping[str, Beat]) -> Written:
    """Writes many heartbeats at once."""
    written = Written()
    for agent_ids in _chunks(list(beats)):
        query = sa.select(Agent.id, Agent.instance_id, Agent.last_seen_time, Agent.telemetry)
        values: list[dict[str, Any]] = []
        for agent_id, holder, last_seen, known in session.execute(query.where(Agent.id.in_(agent_ids))):
            beat = beats[agent_id]
            if holder == beat.instance_id:
                values.append(_values(agent_id, beat))
                if known.get("installations") != values[-1]["telemetry"].get("installations"):
                    written.news.append(agent_id)
            elif holder is not None and (last_seen is None or beat.time > last_seen):
                written.cloned.append(agent_id)
        if values:
            session.execute(sa.update(Agent), values)
    return written


def drop_lines(session: Session, holders: Mapping[str, str]) -> None:
    """Notes that lines have ended, unless another process holds them by now."""
    for agent_id, instance_id in holders.items():
        gone = sa.update(Agent).where(Agent.id == agent_id, Agent.instance_id == instance_id).values(connected=False)
        session.execute(gone)


def drop_stale(session: Session, now: dt.datetime, heartbeat_interval_s: int) -> int:
    """Notes that agents have gone whose replica went with them; returns how many."""
    limit = now - dt.timedelta(seconds=STALE_AFTER_BEATS * heartbeat_interval_s)
    gone = sa.update(Agent).where(Agent.connected.is_(True), Agent.last_seen_time < limit).values(connected=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]


def quarantine(session: Session, agent_id: str, now: dt.datetime) -> None:
    """Shuts an agent out until somebody has looked; every process under its identity is refused from now on."""
    agent = session.get(Agent, agent_id, with_for_update=NO_KEY)
    if agent is None or agent.state is not AgentState.ACTIVE:
        return
    agent.state, agent.reason, agent.connected = AgentState.QUARANTINED, CLONED, False
    name = names.make("agents", agent_id)
    call = Call(method="AgentService/Connect", resource=name)
    audit.record(session, call, "PERMISSION_DENIED", now, actor=name)
    bump(session, "desired_state")


def shut_out(session: Session) -> dict[str, AgentState]:
    """Agents that may not take part, with their state."""
    query = sa.select(Agent.id, Agent.state).where(Agent.state != AgentState.ACTIVE)
    return {agent_id: state for agent_id, state in session.execute(query)}  # noqa: C416 - rows are no pairs to mypy


def reassigned(session: Session, since: dt.datetime) -> Sequence[str]:
    """Agents whose desired state was changed since a time."""
    return session.scalars(sa.select(Assignment.agent_id).where(Assignment.update_time >= since).distinct()).all()


def _values(agent_id: str, beat: Beat) -> dict[str, Any]:
    return {"id": agent_id, "last_seen_time": beat.time, "connected": True, "telemetry": to_json(beat.telemetry)}


def _chunks(items: Sequence[str]) -> Iterable[Sequence[str]]:
    return (items[begin : begin + _CHUNK] for begin in range(0, len(items), _CHUNK))
