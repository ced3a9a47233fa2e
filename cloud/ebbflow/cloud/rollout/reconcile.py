"""The tick over the registry: late agents join, rollouts move, what may no longer be installed goes.

One rollout governs each student: the one that began last, of those that have not ended. It alone says what agents
serve. When it is to be looked at next is kept with it (`due_time`), so that a tick with nothing to do is one query,
whatever the size of the fleet: every report and every verb makes it due, its deadlines do, and so does the passing of
`RECHECK`, which finds what nobody announced (agents that come, go, or change their labels).
"""

import datetime as dt
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Agent,
    Assignment,
    DeviceState,
    Pin,
    Rollout,
    RolloutDevice,
    RolloutState,
    Student,
)
from ebbflow.cloud.rollout import facts, installable, machine, results, selector, state, windows
from ebbflow.cloud.rollout.locking import lock
from ebbflow.cloud.rollout.state import OVER, Step

RECHECK = dt.timedelta(seconds=15)
PENDING = (DeviceState.WAITING, DeviceState.ASSIGNED)

Act = Callable[[facts.Facts], Step]


def tick(registry: Registry, now: dt.datetime) -> int:
    """Takes every step that is due, one transaction for each student. What is wrong with one keeps no other waiting.

    Returns:
        Number of agents whose desired release changed.

    Raises:
        Exception: the first thing that went wrong, after all students had their turn.
    """
    with registry.reading() as session:
        students = session.scalars(sa.select(Rollout.student_id).where(_due(now)).distinct()).all()
    moved, faults = 0, []
    for student_id in students:
        try:
            with registry.transaction() as session:
                moved += _tick_if_due(session, student_id, now)
        except Exception as fault:  # noqa: BLE001 - raised below, after the others
            faults.append(fault)
    if faults:
        raise faults[0]
    return moved


def tick_student(session: Session, student_id: str, now: dt.datetime) -> int:
    """Takes every step that is due for one student, and notes when to look again.

    Returns:
        Number of agents whose desired release changed.
    """
    lock(session, student_id)
    moved = 0
    row = facts.governing(session, student_id)
    while row is not None:
        moved += _tick_row(session, row, now)
        if row.state not in OVER:
            break
        session.flush()
        row = facts.governing(session, student_id)
    session.flush()
    others = Rollout.student_id == student_id, Rollout.due_time.is_not(None)
    session.execute(
        sa.update(Rollout)
        .where(*others, *([] if row is None else [Rollout.id != row.id]))
        .values(due_time=None)
        .execution_options(synchronize_session="fetch")
    )
    return moved + installable.sweep(session, student_id, now) + installable.hold(session, student_id, now)


def wake(row: Rollout, time: dt.datetime) -> None:
    """Makes a rollout due at a time, unless it is due before."""
    if row.due_time is None or row.due_time > time:
        row.due_time = time


def change(session: Session, row: Rollout, act: Act, now: dt.datetime, *where: sa.ColumnElement[bool]) -> int:
    """Takes one step on a rollout, or on those of its devices that `where` selects.

    Returns:
        Number of agents whose desired release changed.
    """
    governs = facts.governing(session, row.student_id) is row
    known = facts.load(session, row, *where)
    return facts.write(session, known, act(known), now, governs=governs)


def enlist(session: Session, row: Rollout, members: dict[str, int], baseline: int | None) -> None:
    """Adds devices, each with the release that it goes back to: what it is told to serve, or else `baseline`."""
    if not members:
        return
    query = sa.select(Assignment.agent_id, Assignment.desired_number).where(Assignment.student_id == row.student_id)
    had = {found.agent_id: found.desired_number for found in session.execute(query)}
    session.execute(
        sa.insert(RolloutDevice),
        [
            {
                "rollout_id": row.id,
                "agent_id": agent_id,
                "phase": phase,
                "state": DeviceState.WAITING,
                "previous_number": had.get(agent_id, baseline),
                "reason": "",
                "fetched_bytes": 0,
                "full_bytes": 0,
            }
            for agent_id, phase in members.items()
        ],
    )


def late(session: Session, row: Rollout) -> list[str]:
    """Agents that may take part in a rollout and are none of its devices yet."""
    wanted = selector.parse(session.get_one(Student, row.student_id).selector)
    enlisted = sa.exists().where(RolloutDevice.rollout_id == row.id, RolloutDevice.agent_id == Agent.id)
    query = (
        sa.select(Agent.id)
        .outerjoin(Pin, sa.and_(Pin.agent_id == Agent.id, Pin.student_id == row.student_id))
        .where(facts.available(wanted), ~enlisted)
    )
    return list(session.scalars(query))


def _due(now: dt.datetime) -> sa.ColumnElement[bool]:
    """Due by now, or at a time that only a clock which has since been put back can have meant."""
    return sa.or_(Rollout.due_time <= now, Rollout.due_time > now + 2 * RECHECK)


def _tick_if_due(session: Session, student_id: str, now: dt.datetime) -> int:
    """Another replica may have been here since this one looked."""
    lock(session, student_id)
    if session.scalars(sa.select(Rollout.id).where(Rollout.student_id == student_id, _due(now))).first() is None:
        return 0
    return tick_student(session, student_id, now)


def _tick_row(session: Session, row: Rollout, now: dt.datetime) -> int:
    finished = row.state is RolloutState.SUCCEEDED
    among = installable.allowed(session, row.student_id)
    proven = installable.proven(session, row.student_id, among, row.release_number)
    baseline = row.release_number if row.rolls_back else proven
    missing = late(session, row)
    if row.release_number in among and not missing and (resting := _resting(session, row, now)):
        row.due_time = resting
        return 0
    enlist(session, row, dict.fromkeys(missing, len(row.phases) - 1), baseline)
    due: list[dt.datetime] = []

    def act(known: facts.Facts) -> Step:
        step = machine.tick(known.rollout, known.devices, now)
        due.extend(filter(None, [machine.next_due(step.rollout, step.devices, now)]))
        return step

    forbidden = row.release_number not in among
    moved = change(session, row, act, now, *([RolloutDevice.state.in_(PENDING)] if finished and not forbidden else []))
    row.due_time = min([*due, now + RECHECK])
    return moved


def _resting(session: Session, row: Rollout, now: dt.datetime) -> dt.datetime | None:
    """When to look again if a tick would change nothing now, otherwise None. The database counts; no device is read."""
    running = row.state is RolloutState.RUNNING
    rollout = facts.rollout_of(row, counts=facts.private_counts(session, row) if running else ())
    groups = results.count(session, row) if running else []  # in any other state only single devices can change
    if not machine.rests(rollout, [group.tally for group in groups], now):
        return None
    if session.scalar(_unsettled(session, row, rollout, now)) is not None:
        return None
    silences = [
        group.first_assign_time + phase.silence_limit
        for group, phase in zip(groups, rollout.phases, strict=False)
        if group.first_assign_time is not None
    ]
    times = [time for time in (machine.next_due(rollout, (), now), *silences) if time is not None and time > now]
    return min([*times, now + RECHECK])


def _unsettled(session: Session, row: Rollout, rollout: state.Rollout, now: dt.datetime) -> sa.Select[str]:
    """One device, if there is any, that a tick might change or tell something else."""
    device, release = RolloutDevice, row.release_number
    span = windows.span(rollout.windows, now) if row.state in state.HANDING_OUT else None
    offered = device.phase <= (row.phase_index if span else -1)
    waits, fetches = device.state == DeviceState.WAITING, device.state == DeviceState.ASSIGNED
    silent = [
        sa.and_(device.phase == index, device.assign_time <= now - phase.silence_limit)
        for index, phase in enumerate(rollout.phases)
    ]
    turn: list[sa.ColumnElement[bool]] = [device.not_before_time.is_(None)]
    turn += [device.not_before_time < span.opening] if span and rollout.windows else []
    told = Assignment.desired_number
    back = sa.and_(told == release, device.previous_number.is_distinct_from(release))
    wrong = sa.or_(
        sa.and_(fetches, sa.or_(Assignment.serving_number == release, *silent)),
        sa.and_(waits, device.phase <= row.phase_index, Assignment.serving_number == release),
        sa.and_(waits, offered, sa.or_(told.is_distinct_from(release), *turn)),
        sa.and_(waits, ~offered, back),
    )
    wanted = selector.parse(session.get_one(Student, row.student_id).selector)
    mine = sa.and_(Assignment.agent_id == device.agent_id, Assignment.student_id == row.student_id)
    return (
        sa.select(device.agent_id)
        .join(Agent, Agent.id == device.agent_id)
        .outerjoin(Assignment, mine)
        .outerjoin(Pin, sa.and_(Pin.agent_id == device.agent_id, Pin.student_id == row.student_id))
        .where(device.rollout_id == row.id, device.state.in_(PENDING), facts.available(wanted), wrong)
        .limit(1)
    )
