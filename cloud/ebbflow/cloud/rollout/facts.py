"""Reads what the decisions need to know from the registry, and writes what was decided."""

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.feedback import acceptance
from ebbflow.cloud.registry import tables
from ebbflow.cloud.registry.changes import bump
from ebbflow.cloud.rollout import installable, machine, selector, wire
from ebbflow.cloud.rollout.phases import Member
from ebbflow.cloud.rollout.state import Acceptance, Device, Rollout, Step

_FIELDS = (
    "agent_id",
    "phase",
    "state",
    "not_before_time",
    "assign_time",
    "answer_time",
    "reason",
    "probe_rise",
    "serving_number",
    "pinned_number",
    "connected",
)


@dataclass(frozen=True)
class Facts:
    """One rollout, its devices, and the release that each is told to serve now."""

    row: tables.Rollout
    rollout: Rollout
    devices: tuple[Device, ...]
    desired: dict[str, int | None]
    """Release by agent; agents without an assignment are absent."""
    replaced: frozenset[str]
    """Agents whose previous release may no longer be installed, so that another one stands here for it."""


def governing(session: Session, student_id: str) -> tables.Rollout | None:
    """The one rollout that says what a student's agents serve: of those that have not ended, the last to begin."""
    query = sa.select(tables.Rollout).where(
        tables.Rollout.student_id == student_id,
        tables.Rollout.state.in_(machine.LIVING),
    )
    query = query.order_by(tables.Rollout.ordinal.desc()).limit(1).execution_options(populate_existing=True)
    return session.scalars(query).one_or_none()


def rollout_of(row: tables.Rollout, *, allowed: bool = True, counts: Sequence[Acceptance | None] = ()) -> Rollout:
    """The decisions' view of a row."""
    return Rollout(
        release_number=row.release_number,
        phases=tuple(wire.from_json(phase) for phase in row.phases),
        rollout_id=row.id,
        windows=tuple(wire.window_from_json(window) for window in row.windows),
        spread=dt.timedelta(seconds=row.spread_s),
        on_halt=row.on_halt,
        state=row.state,
        phase_index=row.phase_index,
        phase_begin_time=row.phase_begin_time,
        phase_passed_time=row.phase_passed_time,
        reason=row.reason,
        approver=row.approver,
        allowed=allowed,
        acceptance=counts,
    )


def private_counts(session: Session, row: tables.Rollout) -> tuple[Acceptance | None, ...]:
    """What private counts say of each phase, where one asks for them."""
    tolerances = [float(phase.get("maxAcceptanceDrop", 0.0)) for phase in row.phases]
    return tuple(acceptance.measure(session, row, tolerances)) if any(tolerances) else ()


def available(wanted: dict[str, str]) -> sa.ColumnElement[bool]:
    """Whether an agent may take part, in SQL over `Agent` and an outer join with its `Pin`."""
    active = tables.Agent.state == tables.AgentState.ACTIVE
    return sa.and_(active, tables.Pin.agent_id.is_(None), *selector.clauses(wanted))


def load(session: Session, row: tables.Rollout, *where: sa.ColumnElement[bool]) -> Facts:
    """Reads a rollout's devices, or those of them that `where` selects."""
    wanted = selector.parse(session.get_one(tables.Student, row.student_id).selector)
    device, agent, assignment, pin = tables.RolloutDevice, tables.Agent, tables.Assignment, tables.Pin
    # Columns and not entities: the session may hold entities from before a bulk update of this very transaction.
    query = (
        sa.select(
            device.agent_id,
            device.phase,
            device.previous_number,
            device.state,
            device.not_before_time,
            device.assign_time,
            device.answer_time,
            device.reason,
            device.probe_rise,
            assignment.serving_number,
            agent.connected,
            available(wanted).label("available"),
            assignment.desired_number,
            assignment.agent_id.label("assigned"),
            pin.release_number.label("pinned_number"),
        )
        .join(agent, agent.id == device.agent_id)
        .outerjoin(assignment, sa.and_(assignment.agent_id == device.agent_id, assignment.student_id == row.student_id))
        .outerjoin(pin, sa.and_(pin.agent_id == device.agent_id, pin.student_id == row.student_id))
        .where(device.rollout_id == row.id, *where)
        .order_by(device.agent_id)
    )
    found = session.execute(query).all()
    allowed = installable.allowed(session, row.student_id)
    replaced = frozenset(each.agent_id for each in found if each.previous_number not in {*allowed, None})
    instead = installable.proven(session, row.student_id, allowed, row.release_number) if replaced else None
    devices = tuple(
        Device(
            **{field: getattr(each, field) for field in _FIELDS},
            available=bool(each.available),
            previous_number=instead if each.agent_id in replaced else each.previous_number,
        )
        for each in found
    )
    desired = {each.agent_id: each.desired_number for each in found if each.assigned is not None}
    counts = () if where else private_counts(session, row)
    return Facts(row, rollout_of(row, allowed=row.release_number in allowed, counts=counts), devices, desired, replaced)


def write(session: Session, facts: Facts, step: Step, now: dt.datetime, *, governs: bool) -> int:
    """Writes a step and, if the rollout governs, what the devices are to serve after it.

    Returns:
        Number of agents whose desired release changed.
    """
    if step.rollout != facts.rollout:
        write_rollout(facts.row, step.rollout, now)
    before = {device.agent_id: device for device in facts.devices}
    changed = [d for d in step.devices if d is not before[d.agent_id] or d.agent_id in facts.replaced]
    if changed:
        session.execute(sa.update(tables.RolloutDevice), [_values(facts.row.id, device) for device in changed])
    if not governs:
        return 0
    wanted = {device.agent_id: machine.desired(step.rollout, device, now) for device in step.devices}
    moved = {agent: number for agent, number in wanted.items() if facts.desired.get(agent) != number}
    pinned = {device.agent_id for device in step.devices if device.pinned_number is not None}
    assign(session, facts.row, moved, known=facts.desired.keys(), pinned=pinned, now=now)
    return len(moved)


def write_rollout(row: tables.Rollout, rollout: Rollout, now: dt.datetime) -> None:
    """Writes the rollout itself."""
    row.state = rollout.state
    row.phases = [wire.to_json(phase) for phase in rollout.phases]
    row.phase_index = rollout.phase_index
    row.phase_begin_time = rollout.phase_begin_time
    row.phase_passed_time = rollout.phase_passed_time
    row.reason = rollout.reason[:1024]
    row.approver = rollout.approver
    row.update_time = now


def assign(
    session: Session,
    row: tables.Rollout,
    wanted: dict[str, int | None],
    *,
    known: Iterable[str],
    pinned: set[str],
    now: dt.datetime,
) -> None:
    """Tells agents what to serve, and every replica that it should hint them."""
    if not wanted:
        return
    present = set(known)
    values: list[dict[str, Any]] = [
        {
            "agent_id": agent,
            "student_id": row.student_id,
            "desired_number": number,
            "rollout_id": row.id if number == row.release_number and agent not in pinned else None,
            "update_time": now,
        }
        for agent, number in wanted.items()
    ]
    session.flush()
    if old := [value for value in values if value["agent_id"] in present]:
        session.execute(sa.update(tables.Assignment), old)
    if new := [value for value in values if value["agent_id"] not in present]:
        session.execute(sa.insert(tables.Assignment), [{"installation": {}, **value} for value in new])
    bump(session, "desired_state")


def candidates(session: Session, student_id: str) -> list[Member]:
    """Agents that may take part in a student's rollouts now: selected, active and not pinned."""
    wanted = selector.parse(session.get_one(tables.Student, student_id).selector)
    agent, pin = tables.Agent, tables.Pin
    query = (
        sa.select(agent.id, agent.labels, agent.connected)
        .outerjoin(pin, sa.and_(pin.agent_id == agent.id, pin.student_id == student_id))
        .where(available(wanted))
    )
    return [Member(found.id, found.labels, found.connected) for found in session.execute(query)]


def _values(rollout_id: str, device: Device) -> dict[str, Any]:
    return {
        "rollout_id": rollout_id,
        "agent_id": device.agent_id,
        "phase": device.phase,
        "previous_number": device.previous_number,
        "state": device.state,
        "not_before_time": device.not_before_time,
        "assign_time": device.assign_time,
        "answer_time": device.answer_time,
        "reason": device.reason[:255],
        "probe_rise": device.probe_rise,
    }
