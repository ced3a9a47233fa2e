"""Reads what the machine needs to know from the registry, and writes what it decided."""

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry import tables
from ebbflow.cloud.registry.changes import bump
from ebbflow.cloud.rollout import machine, selector, wire

_FIELDS = (
    "agent_id",
    "phase",
    "previous_number",
    "state",
    "assign_time",
    "answer_time",
    "reason",
    "serving_number",
    "connected",
)


@dataclass(frozen=True)
class Facts:
    """One rollout, its devices, and the release that each is told to serve now."""

    row: tables.Rollout
    rollout: machine.Rollout
    devices: tuple[machine.Device, ...]
    desired: dict[str, int | None]
    """Release by agent; agents without an assignment are absent."""


def rollout_of(row: tables.Rollout) -> machine.Rollout:
    """The machine's view of a row."""
    return machine.Rollout(
        release_number=row.release_number,
        phases=tuple(wire.from_json(phase) for phase in row.phases),
        state=row.state,
        phase_index=row.phase_index,
        phase_passed_time=row.phase_passed_time,
        reason=row.reason,
    )


def load(session: Session, row: tables.Rollout, *where: sa.ColumnElement[bool]) -> Facts:
    """Reads a rollout's devices, or those of them that `where` selects."""
    wanted = selector.parse(session.get_one(tables.Student, row.student_id).selector)
    device, agent, assignment = tables.RolloutDevice, tables.Agent, tables.Assignment
    # Columns and not entities: the session may hold entities from before a bulk update of this very transaction.
    query = (
        sa.select(
            device.agent_id,
            device.phase,
            device.previous_number,
            device.state,
            device.assign_time,
            device.answer_time,
            device.reason,
            assignment.serving_number,
            agent.connected,
            agent.state.label("agent_state"),
            agent.labels,
            assignment.desired_number,
            assignment.agent_id.label("assigned"),
        )
        .join(agent, agent.id == device.agent_id)
        .outerjoin(assignment, sa.and_(assignment.agent_id == device.agent_id, assignment.student_id == row.student_id))
        .where(device.rollout_id == row.id, *where)
        .order_by(device.agent_id)
    )
    devices: list[machine.Device] = []
    desired: dict[str, int | None] = {}
    for found in session.execute(query):
        known = {field: getattr(found, field) for field in _FIELDS}
        available = found.agent_state is tables.AgentState.ACTIVE and selector.matches(wanted, found.labels)
        devices.append(machine.Device(**known, available=available))
        if found.assigned is not None:
            desired[found.agent_id] = found.desired_number
    return Facts(row, rollout_of(row), tuple(devices), desired)


def write(session: Session, facts: Facts, step: machine.Step, now: dt.datetime) -> int:
    """Writes a step and what the devices are to serve after it.

    Returns:
        Number of agents whose desired release changed.
    """
    if step.rollout != facts.rollout:
        write_rollout(facts.row, step.rollout, now)
    before = dict(zip((d.agent_id for d in facts.devices), facts.devices, strict=True))
    changed = [device for device in step.devices if device != before[device.agent_id]]
    if changed:
        session.execute(sa.update(tables.RolloutDevice), [_values(facts.row.id, device) for device in changed])
    wanted = {device.agent_id: machine.desired(step.rollout, device) for device in step.devices}
    moved = {agent: number for agent, number in wanted.items() if facts.desired.get(agent) != number}
    assign(session, facts.row, moved, known=facts.desired.keys(), now=now)
    return len(moved)


def write_rollout(row: tables.Rollout, rollout: machine.Rollout, now: dt.datetime) -> None:
    """Writes the rollout itself."""
    row.state = rollout.state
    row.phase_index = rollout.phase_index
    row.phase_passed_time = rollout.phase_passed_time
    row.reason = rollout.reason
    row.update_time = now


def assign(
    session: Session, row: tables.Rollout, wanted: dict[str, int | None], known: Iterable[str], now: dt.datetime
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
            "rollout_id": row.id if number == row.release_number else None,
            "update_time": now,
        }
        for agent, number in wanted.items()
    ]
    session.flush()
    if old := [value for value in values if value["agent_id"] in present]:
        session.execute(sa.update(tables.Assignment), old)
    session.add_all(tables.Assignment(**value) for value in values if value["agent_id"] not in present)
    session.flush()
    bump(session, "desired_state")


def candidates(session: Session, student_id: str) -> Sequence[tables.Agent]:
    """Agents that may serve a student now."""
    wanted = selector.parse(session.get_one(tables.Student, student_id).selector)
    query = sa.select(tables.Agent).where(tables.Agent.state == tables.AgentState.ACTIVE, *selector.clauses(wanted))
    return session.scalars(query).all()


def _values(rollout_id: str, device: machine.Device) -> dict[str, Any]:
    return {
        "rollout_id": rollout_id,
        "agent_id": device.agent_id,
        "phase": device.phase,
        "state": device.state,
        "assign_time": device.assign_time,
        "answer_time": device.answer_time,
        "reason": device.reason[:255],
    }
