"""Rollouts in the registry: creates them, ticks them, and takes what people and agents say of them.

Every function here is one step inside the caller's transaction, and excludes the other replicas' steps on the same
student for its length; calling one twice does no harm.
"""

import datetime as dt
import hashlib
import secrets
from collections.abc import Callable, Iterable, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.locks import exclusive
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    DeviceState,
    Release,
    ReleaseState,
    Rollout,
    RolloutDevice,
    RolloutState,
    Student,
)
from ebbflow.cloud.rollout import facts, machine, phases, selector, wire
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

PENDING = (DeviceState.WAITING, DeviceState.ASSIGNED)


def create(session: Session, student_id: str, number: int, plan: Sequence[phases.Phase], now: dt.datetime) -> Rollout:
    """Starts a rollout; an unfinished one of the same student makes way.

    Args:
        session: the caller's transaction.
        student_id: whose release.
        number: the release's number.
        plan: the phases; none takes the defaults.
        now: the time.

    Raises:
        EbbflowError: RELEASE_NOT_FOUND, RELEASE_NOT_PUBLISHED, or INVALID_REQUEST for phases that cannot work.
    """
    lock(session, student_id)
    _require_published(session, student_id, number)
    for row in _active(session, student_id):
        _change(session, row, lambda known: machine.Step(machine.supersede(known.rollout), known.devices), now)
    rollout_id = secrets.token_hex(6)
    agents = sorted(facts.candidates(session, student_id), key=lambda agent: _canary_order(rollout_id, agent))
    plan = plan or phases.defaults(len(agents))
    phases.check(plan)
    row = Rollout(
        id=rollout_id,
        student_id=student_id,
        release_number=number,
        state=RolloutState.RUNNING,
        phases=[wire.to_json(phase) for phase in plan],
        create_time=now,
        update_time=now,
    )
    session.add(row)
    session.flush()
    _enlist(session, row, phases.freeze([agent.id for agent in agents], plan), baseline=None)
    _change(session, row, lambda known: machine.tick(known.rollout, known.devices, now), now)
    return row


def tick(registry: Registry, now: dt.datetime) -> int:
    """Takes every step that is due, one transaction for each student.

    Returns:
        Number of agents whose desired release changed.
    """
    with registry.reading() as session:
        living = [*machine.UNFINISHED, RolloutState.SUCCEEDED]
        students = session.scalars(sa.select(Rollout.student_id).where(Rollout.state.in_(living)).distinct()).all()
    moved = 0
    for student_id in students:
        with registry.transaction() as session:
            moved += tick_student(session, student_id, now)
    return moved


def tick_student(session: Session, student_id: str, now: dt.datetime) -> int:
    """Takes every step that is due for one student: late agents join, then the rollout moves.

    Late agents join the unfinished rollout, and serve the last finished one's release until their phase begins.
    """
    lock(session, student_id)
    finished = _finished(session, student_id)
    row = next(iter(_active(session, student_id)), None) or finished
    if row is None:
        return 0
    baseline = finished.release_number if finished is not None and finished is not row else None
    late = session.scalars(_late(session, row)).all()
    _enlist(session, row, dict.fromkeys(late, len(row.phases) - 1), baseline)
    where = [RolloutDevice.state.in_(PENDING)] if row.state is RolloutState.SUCCEEDED else []
    return _change(session, row, lambda known: machine.tick(known.rollout, known.devices, now), now, *where)


def pause(session: Session, rollout_id: str, now: dt.datetime) -> Rollout:
    """See `machine.pause`; also ROLLOUT_NOT_FOUND."""
    return _verb(session, rollout_id, lambda known: machine.Step(machine.pause(known.rollout), known.devices), now)


def resume(session: Session, rollout_id: str, now: dt.datetime) -> Rollout:
    """See `machine.resume`; also ROLLOUT_NOT_FOUND."""
    return _verb(session, rollout_id, lambda known: machine.resume(known.rollout, known.devices), now)


def abort(session: Session, rollout_id: str, now: dt.datetime) -> Rollout:
    """See `machine.abort`; also ROLLOUT_NOT_FOUND."""
    return _verb(session, rollout_id, lambda known: machine.Step(machine.abort(known.rollout), known.devices), now)


def lock(session: Session, student_id: str) -> None:
    """Excludes other steps on a student's rollouts and assignments. Taken before any of their rows, always."""
    exclusive(session, f"rollouts/{student_id}")


def find(session: Session, rollout_id: str) -> Rollout:
    """Returns a rollout.

    Raises:
        EbbflowError: ROLLOUT_NOT_FOUND.
    """
    row = session.get(Rollout, rollout_id)
    if row is None:
        name = names.make("rollouts", rollout_id)
        raise EbbflowError(Reason.ROLLOUT_NOT_FOUND, f"there is no {name}", rollout=name)
    return row


def counts(session: Session, rollout_ids: Iterable[str]) -> dict[str, dict[DeviceState, int]]:
    """Devices by state, for each rollout."""
    query = (
        sa.select(RolloutDevice.rollout_id, RolloutDevice.state, sa.func.count())
        .where(RolloutDevice.rollout_id.in_(list(rollout_ids)))
        .group_by(RolloutDevice.rollout_id, RolloutDevice.state)
    )
    found: dict[str, dict[DeviceState, int]] = {}
    for rollout_id, state, count in session.execute(query):
        found.setdefault(rollout_id, {})[state] = count
    return found


def tell(session: Session, agent_id: str, now: dt.datetime) -> None:
    """Notes that an agent has read its desired state."""
    for row in untold(session, agent_id):
        lock(session, row.student_id)
        session.refresh(row)
        _advance(session, row, agent_id, lambda known, device: machine.tell(known.rollout, device, now), now)


def untold(session: Session, agent_id: str) -> Sequence[Rollout]:
    """Rollouts that have begun for an agent which has not read so yet."""
    query = (
        sa.select(Rollout)
        .join(RolloutDevice, RolloutDevice.rollout_id == Rollout.id)
        .where(
            RolloutDevice.agent_id == agent_id,
            RolloutDevice.state == DeviceState.WAITING,
            RolloutDevice.phase <= Rollout.phase_index,
            Rollout.state.in_(machine.HANDING_OUT),
        )
        .order_by(Rollout.student_id, Rollout.create_time)  # the order in which `tell` locks
    )
    return session.scalars(query).all()


def fetching(session: Session, agent_id: str, student_id: str, number: int, now: dt.datetime) -> None:
    """Notes that an agent is fetching a release."""
    _heard(session, agent_id, student_id, number, lambda _, device: machine.fetching(device, now), now)


def answer(
    session: Session,
    agent_id: str,
    student_id: str,
    number: int,
    now: dt.datetime,
    *,
    succeeded: bool,
    reason: str = "",
) -> None:
    """Notes what became of a release on an agent's device."""

    def act(known: facts.Facts, device: machine.Device) -> machine.Device:
        if machine.desired(known.rollout, device) != number and device.state is DeviceState.WAITING:
            return device
        return machine.answer(device, succeeded, now, reason)

    _heard(session, agent_id, student_id, number, act, now)


_Act = Callable[[facts.Facts, machine.Device], machine.Device]


def _heard(session: Session, agent_id: str, student_id: str, number: int, act: _Act, now: dt.datetime) -> None:
    lock(session, student_id)
    query = (
        sa.select(Rollout)
        .join(RolloutDevice, RolloutDevice.rollout_id == Rollout.id)
        .where(
            RolloutDevice.agent_id == agent_id,
            Rollout.student_id == student_id,
            Rollout.release_number == number,
            Rollout.state.not_in(machine.OVER),
        )
        .order_by(Rollout.create_time.desc())
        .limit(1)
    )
    row = session.scalars(query).one_or_none()
    if row is not None:
        _advance(session, row, agent_id, act, now)


def _advance(session: Session, row: Rollout, agent_id: str, act: _Act, now: dt.datetime) -> None:
    """One device's step: nobody else's row is read."""

    def step(known: facts.Facts) -> machine.Step:
        return machine.Step(known.rollout, tuple(act(known, device) for device in known.devices))

    _change(session, row, step, now, RolloutDevice.agent_id == agent_id)


def _change(
    session: Session,
    row: Rollout,
    step: Callable[[facts.Facts], machine.Step],
    now: dt.datetime,
    *where: sa.ColumnElement[bool],
) -> int:
    known = facts.load(session, row, *where)
    return facts.write(session, known, step(known), now)


def _verb(session: Session, rollout_id: str, step: Callable[[facts.Facts], machine.Step], now: dt.datetime) -> Rollout:
    row = find(session, rollout_id)
    lock(session, row.student_id)
    session.refresh(row)

    def then_tick(known: facts.Facts) -> machine.Step:
        taken = step(known)
        return machine.tick(taken.rollout, taken.devices, now)

    _change(session, row, then_tick, now)
    return row


def _active(session: Session, student_id: str) -> Sequence[Rollout]:
    query = sa.select(Rollout).where(Rollout.student_id == student_id, Rollout.state.in_(machine.UNFINISHED))
    return session.scalars(query.order_by(Rollout.create_time.desc())).all()


def _finished(session: Session, student_id: str) -> Rollout | None:
    """The rollout whose release late agents get."""
    query = sa.select(Rollout).where(Rollout.student_id == student_id, Rollout.state == RolloutState.SUCCEEDED)
    return session.scalars(query.order_by(Rollout.create_time.desc()).limit(1)).one_or_none()


def _late(session: Session, row: Rollout) -> sa.Select[str]:
    wanted = selector.parse(session.get_one(Student, row.student_id).selector)
    enlisted = sa.exists().where(RolloutDevice.rollout_id == row.id, RolloutDevice.agent_id == Agent.id)
    return sa.select(Agent.id).where(Agent.state == AgentState.ACTIVE, ~enlisted, *selector.clauses(wanted))


def _enlist(session: Session, row: Rollout, members: dict[str, int], baseline: int | None) -> None:
    """Adds devices, each with the release that it goes back to."""
    if not members:
        return
    query = sa.select(Assignment.agent_id, Assignment.desired_number).where(Assignment.student_id == row.student_id)
    had: dict[str, int | None] = {found.agent_id: found.desired_number for found in session.execute(query)}
    session.add_all(
        RolloutDevice(
            rollout_id=row.id,
            agent_id=agent_id,
            phase=phase,
            state=DeviceState.WAITING,
            previous_number=had.get(agent_id) or baseline,
        )
        for agent_id, phase in members.items()
    )
    session.flush()


def _require_published(session: Session, student_id: str, number: int) -> None:
    release = session.get(Release, (student_id, number))
    name = names.release(student_id, number)
    if release is None:
        raise EbbflowError(Reason.RELEASE_NOT_FOUND, f"there is no {name}", release=name)
    if release.state is not ReleaseState.PUBLISHED:
        message = f"{name} is {release.state.value}, not published"
        raise EbbflowError(Reason.RELEASE_NOT_PUBLISHED, message, release=name, state=release.state.value)


def _canary_order(rollout_id: str, agent: Agent) -> tuple[bool, str]:
    """Canaries are drawn by chance among the agents that are connected: one that is off tells nothing."""
    return not agent.connected, hashlib.sha256(f"{rollout_id}/{agent.id}".encode()).hexdigest()
