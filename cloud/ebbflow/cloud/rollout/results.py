"""What came of a rollout so far. The database counts, so that ten thousand devices are read as a few dozen rows."""

import datetime as dt
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import Agent, DeviceState, Pin, Rollout, RolloutDevice, Student
from ebbflow.cloud.rollout import decision, facts, installable, selector, state
from ebbflow.cloud.rollout.gates import Tally
from ebbflow.cloud.rollout.state import Acceptance, Decision

MAX_FAILURES = 20
"""Reasons that are listed."""
MAX_AGENTS = 10
"""Agents that are named for each reason."""


@dataclass(frozen=True)
class PhaseResult:
    """What came of one phase."""

    counts: dict[DeviceState, int]
    """Its devices by state."""
    probe_rise: float
    """Mean rise of their probe loss over the published one, in nats per token; 0 if nobody has measured."""
    acceptance: Acceptance | None
    """What private counts say; None where nobody looks, or they say nothing."""
    soak_end_time: dt.datetime | None
    """When its soak time ends; None unless it is the current one and its success share is met."""


@dataclass(frozen=True)
class Failure:
    """One reason why devices failed."""

    reason: str
    count: int
    agents: tuple[str, ...]
    """Identifiers of some of them, in order."""


@dataclass(frozen=True)
class Results:
    """Everything that came of a rollout."""

    phases: tuple[PhaseResult, ...]
    next_decision: Decision
    failures: tuple[Failure, ...] = ()
    """Most frequent first."""
    fetched_bytes: int = 0
    """Bytes that its devices fetched for it."""
    full_bytes: int = 0
    """Bytes that the full files would have been for them."""


@dataclass
class Group:
    """Devices of one phase, counted."""

    tally: Tally = field(default_factory=Tally)
    """Those that may take part."""
    counts: dict[DeviceState, int] = field(default_factory=dict)
    """All of them."""
    fetched_bytes: int = 0
    full_bytes: int = 0
    first_assign_time: dt.datetime | None = None
    """When the first of those that have not answered was told, or last heard."""


def of(session: Session, row: Rollout, now: dt.datetime) -> Results:
    """Reads what came of a rollout."""
    allowed = row.release_number in installable.allowed(session, row.student_id)
    rollout = facts.rollout_of(row, allowed=allowed, counts=facts.private_counts(session, row))
    groups = count(session, row)
    return summarise(rollout, groups, _failures(session, row.id), now)


def summarise(rollout: state.Rollout, groups: list[Group], failures: tuple[Failure, ...], now: dt.datetime) -> Results:
    """Puts results together. IO-free."""
    return Results(
        phases=tuple(_phase(rollout, index, group) for index, group in enumerate(groups)),
        next_decision=decision.decide(rollout, [group.tally for group in groups], now),
        failures=failures,
        fetched_bytes=sum(group.fetched_bytes for group in groups),
        full_bytes=sum(group.full_bytes for group in groups),
    )


def count(session: Session, row: Rollout) -> list[Group]:
    """Counts a rollout's devices by phase."""
    wanted = selector.parse(session.get_one(Student, row.student_id).selector)
    device = RolloutDevice
    alike = device.phase, device.state, Agent.connected, facts.available(wanted).label("available")
    query = (
        sa.select(
            *alike,
            sa.func.count().label("devices"),
            sa.func.count(device.probe_rise).label("measured"),
            sa.func.coalesce(sa.func.sum(device.probe_rise), 0.0).label("rise_sum"),
            sa.func.sum(device.fetched_bytes).label("fetched_bytes"),
            sa.func.sum(device.full_bytes).label("full_bytes"),
            sa.func.min(device.assign_time).label("first_assign_time"),
        )
        .join(Agent, Agent.id == device.agent_id)
        .outerjoin(Pin, sa.and_(Pin.agent_id == device.agent_id, Pin.student_id == row.student_id))
        .where(device.rollout_id == row.id)
        .group_by(*alike)
    )
    groups = [Group() for _ in row.phases]
    for found in session.execute(query):
        group = groups[found.phase]
        group.counts[found.state] = group.counts.get(found.state, 0) + found.devices
        group.fetched_bytes += int(found.fetched_bytes)
        group.full_bytes += int(found.full_bytes)
        if found.state is DeviceState.ASSIGNED and found.first_assign_time is not None:
            group.first_assign_time = min(found.first_assign_time, group.first_assign_time or found.first_assign_time)
        available = bool(found.available)
        group.tally.add(found.state, available=available, connected=bool(found.connected), times=found.devices)
        group.tally.measure(float(found.rise_sum), found.measured)
    return groups


def _phase(rollout: state.Rollout, index: int, group: Group) -> PhaseResult:
    current = index == rollout.phase_index and rollout.state in state.HANDING_OUT
    return PhaseResult(
        counts={each: group.counts.get(each, 0) for each in DeviceState},
        probe_rise=group.tally.mean_rise,
        acceptance=rollout.acceptance[index] if index < len(rollout.acceptance) else None,
        soak_end_time=decision.soak_end(rollout) if current else None,
    )


def _failures(session: Session, rollout_id: str) -> tuple[Failure, ...]:
    device = RolloutDevice
    failed = device.rollout_id == rollout_id, device.state == DeviceState.FAILED
    often = sa.select(device.reason, sa.func.count().label("devices")).where(*failed).group_by(device.reason)
    by_reason = session.execute(often.order_by(sa.desc("devices"), device.reason).limit(MAX_FAILURES)).all()
    if not by_reason:
        return ()
    rank = sa.func.row_number().over(partition_by=device.reason, order_by=device.agent_id).label("rank")
    ranked = sa.select(device.reason, device.agent_id, rank).where(*failed).subquery()
    named = sa.select(ranked.c.reason, ranked.c.agent_id).where(ranked.c.rank <= MAX_AGENTS).order_by(ranked.c.agent_id)
    agents: dict[str, list[str]] = {}
    for reason, agent_id in session.execute(named):
        agents.setdefault(reason, []).append(agent_id)
    return tuple(Failure(reason, devices, tuple(agents.get(reason, ()))) for reason, devices in by_reason)
