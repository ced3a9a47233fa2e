"""Rollouts in the registry: what people do with them, and the way to everything else about them.

Every function here is one step inside the caller's transaction, and excludes the other replicas' steps on the same
student for its length.
"""

import datetime as dt
import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import Assignment, DeviceState, OnHalt, Rollout, RolloutDevice, RolloutState
from ebbflow.cloud.rollout import facts, installable, machine, phases, reconcile, verbs, wire
from ebbflow.cloud.rollout import spec as specs
from ebbflow.cloud.rollout.locking import lock
from ebbflow.cloud.rollout.phases import Member, Phase
from ebbflow.cloud.rollout.reconcile import tick, tick_student
from ebbflow.cloud.rollout.reports import answer, fetching, tell, untold
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.rollout.state import Step
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

__all__ = [
    "Preview",
    "abort",
    "answer",
    "approve",
    "counts",
    "create",
    "fetching",
    "find",
    "lock",
    "pause",
    "preview",
    "resume",
    "retry",
    "revoke",
    "roll_back",
    "tell",
    "tick",
    "tick_student",
    "untold",
]


@dataclass(frozen=True)
class Preview:
    """What `create` would begin with."""

    phases: tuple[Phase, ...]
    """With the built-in ones filled in."""
    members: tuple[int, ...]
    """Agents of each phase."""
    connected: tuple[int, ...]
    """Those of them that are connected."""


def create(session: Session, spec: RolloutSpec, now: dt.datetime) -> Rollout:
    """Freezes the phases' members and starts a rollout, or lets it wait for approval.

    An unfinished rollout of the same student makes way as soon as this one begins: on its approval, if it needs one.

    Args:
        session: the caller's transaction.
        spec: what to start.
        now: the time.

    Raises:
        EbbflowError: RELEASE_NOT_FOUND, RELEASE_NOT_PUBLISHED, RELEASE_REVOKED, RELEASE_TOO_OLD, or INVALID_REQUEST for
            what cannot work.
    """
    specs.check(spec)
    lock(session, spec.student_id)
    installable.require(session, spec.student_id, spec.number)
    row = _add(session, spec, now)
    if not spec.approval_required:
        _begin(session, row, verbs.begin(facts.rollout_of(row), now), now)
    return row


def preview(session: Session, spec: RolloutSpec, now: dt.datetime) -> Preview:
    """What `create` would begin with; changes nothing.

    Raises:
        EbbflowError: as `create`.
    """
    specs.check(spec)
    installable.require(session, spec.student_id, spec.number)
    members = facts.candidates(session, spec.student_id)
    plan, placed = _plan(spec, members, rollout_id=f"preview at {now}")
    connected = {member.agent_id for member in members if member.connected}
    everybody = Counter(placed.values())
    reachable = Counter(phase for agent_id, phase in placed.items() if agent_id in connected)
    order = range(len(plan))
    return Preview(plan, tuple(everybody[index] for index in order), tuple(reachable[index] for index in order))


def approve(session: Session, rollout_id: str, who: str, now: dt.datetime) -> Rollout:
    """Lets a rollout begin that waits for a second person; older unfinished ones of the student make way now.

    Raises:
        EbbflowError: ROLLOUT_NOT_FOUND; STATE_CONFLICT unless it waits; APPROVAL_REQUIRED if `who` created it;
            RELEASE_REVOKED and its like if its release may no longer be installed.
    """
    row = _locked(session, rollout_id)
    approved = verbs.approve(facts.rollout_of(row), row.creator, who, now)
    installable.require(session, row.student_id, row.release_number)
    _begin(session, row, approved, now)
    return row


def pause(session: Session, rollout_id: str, now: dt.datetime) -> Rollout:
    """See `verbs.pause`; also ROLLOUT_NOT_FOUND."""
    return _verb(session, rollout_id, lambda known: Step(verbs.pause(known.rollout), known.devices), now)


def resume(session: Session, rollout_id: str, now: dt.datetime) -> Rollout:
    """See `verbs.resume`; also ROLLOUT_NOT_FOUND."""
    return _verb(session, rollout_id, lambda known: verbs.resume(known.rollout, known.devices, now), now)


def abort(session: Session, rollout_id: str, now: dt.datetime) -> Rollout:
    """See `verbs.abort`; also ROLLOUT_NOT_FOUND."""
    return _verb(session, rollout_id, lambda known: Step(verbs.abort(known.rollout), known.devices), now)


def retry(session: Session, rollout_id: str, agent_ids: Collection[str], now: dt.datetime) -> Rollout:
    """See `verbs.retry`; also ROLLOUT_NOT_FOUND, and STATE_CONFLICT if a newer rollout has taken over."""
    row = _locked(session, rollout_id)
    if row.state in machine.LIVING and facts.governing(session, row.student_id) is not row:
        message = "a newer rollout of the student has taken over; retry that one"
        raise EbbflowError(Reason.STATE_CONFLICT, message, state=row.state.value)
    return _verb(session, rollout_id, lambda known: verbs.retry(known.rollout, known.devices, agent_ids, now), now)


def roll_back(session: Session, student_id: str, number: int | None, creator: str, now: dt.datetime) -> Rollout:
    """Brings every device to an earlier release at once: no phases, no windows, no spread.

    It is for emergencies, so it needs no second person's approval: it can only choose what is published and allowed. It
    aborts what is unfinished, also what waits for approval. A device that fails on the way is asked to try again; it is
    never sent back to the release that it is to leave.

    Args:
        session: the caller's transaction.
        student_id: whose devices.
        number: the release to go back to; None takes the one that most devices of the newest rollout had before.
        creator: who asks, such as "admins/ada".
        now: the time.

    Raises:
        EbbflowError: STATE_CONFLICT if no number is given and the devices had nothing before; RELEASE_NOT_FOUND,
            RELEASE_NOT_PUBLISHED, RELEASE_REVOKED or RELEASE_TOO_OLD.
    """
    lock(session, student_id)
    chosen = _number_before(session, student_id) if number is None else number
    installable.require(session, student_id, chosen)
    for row in _unfinished(session, student_id):
        reconcile.change(session, row, lambda known: Step(verbs.abort(known.rollout), known.devices), now)
        session.flush()
    plan = (phases.everybody(len(facts.candidates(session, student_id))),)
    row = _add(session, RolloutSpec(student_id=student_id, number=chosen, phases=plan, creator=creator), now)
    row.rolls_back = True
    _begin(session, row, verbs.begin(facts.rollout_of(row), now), now)
    return row


def revoke(session: Session, student_id: str, number: int, now: dt.datetime) -> None:
    """Steers every device away from a release that was revoked or lies below the student's lowest one.

    Its rollouts are aborted; assignments and pins move to a release that may be installed, or to none. Call it after
    the release's or the student's row says so. The tick does the same by itself, only later.
    """
    lock(session, student_id)
    session.flush()
    among = installable.allowed(session, student_id)
    for row in _unfinished(session, student_id):
        if row.state is RolloutState.WAITING_FOR_APPROVAL and row.release_number not in among:
            row.state, row.update_time = RolloutState.ABORTED, now
            row.reason = f"release {row.release_number} may no longer be installed"
    tick_student(session, student_id, now)


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


def _add(session: Session, spec: RolloutSpec, now: dt.datetime) -> Rollout:
    rollout_id = secrets.token_hex(6)
    plan, placed = _plan(spec, facts.candidates(session, spec.student_id), rollout_id)
    row = Rollout(
        id=rollout_id,
        student_id=spec.student_id,
        release_number=spec.number,
        state=RolloutState.WAITING_FOR_APPROVAL,
        phases=[wire.to_json(phase) for phase in plan],
        windows=[wire.window_to_json(window) for window in spec.windows],
        spread_s=spec.spread_s,
        on_halt=OnHalt(spec.on_halt),
        creator=spec.creator,
        create_time=now,
        update_time=now,
    )
    session.add(row)
    session.flush()
    reconcile.enlist(session, row, placed, baseline=None)
    return row


def _begin(session: Session, row: Rollout, begun: machine.Rollout, now: dt.datetime) -> None:
    """Makes a rollout the student's governing one: older ones make way, and what devices go back to is read now."""
    for other in _unfinished(session, row.student_id):
        newer = other.state is RolloutState.WAITING_FOR_APPROVAL and other.create_time > row.create_time
        if other is not row and not newer:
            reconcile.change(session, other, lambda known: Step(verbs.supersede(known.rollout), known.devices), now)
            session.flush()
    _set_previous(session, row)
    last = sa.select(sa.func.max(Rollout.ordinal)).where(Rollout.student_id == row.student_id)
    row.ordinal = (session.scalar(last) or 0) + 1
    facts.write_rollout(row, begun, now)
    session.flush()
    tick_student(session, row.student_id, now)


def _set_previous(session: Session, row: Rollout) -> None:
    """Notes what each device goes back to: what it is told to serve now, or nothing else if the rollout rolls back."""
    mine = Assignment.agent_id == RolloutDevice.agent_id, Assignment.student_id == row.student_id
    told = sa.select(Assignment.desired_number).where(*mine).scalar_subquery()
    among = installable.allowed(session, row.student_id)
    baseline = installable.proven(session, row.student_id, among, row.release_number)
    had = sa.case((sa.exists().where(*mine), told), else_=sa.cast(baseline, sa.BigInteger))
    change = sa.update(RolloutDevice).where(RolloutDevice.rollout_id == row.id)
    number = sa.literal(row.release_number) if row.rolls_back else had
    session.execute(change.values(previous_number=number), execution_options={"synchronize_session": False})


def _verb(session: Session, rollout_id: str, act: Callable[[facts.Facts], Step], now: dt.datetime) -> Rollout:
    row = _locked(session, rollout_id)
    reconcile.change(session, row, act, now)
    session.flush()
    tick_student(session, row.student_id, now)
    return row


def _locked(session: Session, rollout_id: str) -> Rollout:
    row = find(session, rollout_id)
    lock(session, row.student_id)
    session.refresh(row)
    return row


def _unfinished(session: Session, student_id: str) -> list[Rollout]:
    query = sa.select(Rollout).where(Rollout.student_id == student_id, Rollout.state.in_(machine.UNFINISHED))
    return list(session.scalars(query.order_by(Rollout.create_time.desc()).execution_options(populate_existing=True)))


def _number_before(session: Session, student_id: str) -> int:
    """The release that most devices of the newest rollout had before, of those that may be installed."""
    begun = sa.select(Rollout).where(Rollout.student_id == student_id, Rollout.ordinal > 0)
    row = session.scalars(begun.order_by(Rollout.ordinal.desc()).limit(1)).one_or_none()
    among = installable.allowed(session, student_id)
    if row is not None:
        query = (
            sa.select(RolloutDevice.previous_number)
            .where(RolloutDevice.rollout_id == row.id)
            .where(RolloutDevice.previous_number.in_(among - {row.release_number}))
            .group_by(RolloutDevice.previous_number)
            .order_by(sa.func.count().desc(), RolloutDevice.previous_number.desc())
        )
        if (found := session.scalars(query.limit(1)).first()) is not None:
            return found
    message = "the devices had no other release before that may be installed: name the release to go back to"
    raise EbbflowError(Reason.STATE_CONFLICT, message, student=names.make("students", student_id))


def _plan(spec: RolloutSpec, members: list[Member], rollout_id: str) -> tuple[tuple[Phase, ...], dict[str, int]]:
    """The phases, and the phase of every agent."""
    plan = tuple(spec.phases) or phases.defaults(len(members))
    phases.check(plan)
    drawn = sorted(members, key=lambda member: _canary_order(rollout_id, member))
    return plan, phases.freeze(drawn, plan)


def _canary_order(rollout_id: str, member: Member) -> tuple[bool, str]:
    """Canaries are drawn by chance among the agents that are connected: one that is off tells nothing."""
    return not member.connected, hashlib.sha256(f"{rollout_id}/{member.agent_id}".encode()).hexdigest()
