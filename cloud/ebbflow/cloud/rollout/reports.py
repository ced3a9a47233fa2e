"""What agents say of releases, as one step of the rollout that brought them there.

Every function is one step inside the caller's transaction, and excludes the other replicas' steps on the same student
for its length; calling one twice does no harm.
"""

import datetime as dt
from collections.abc import Callable, Sequence

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import release_pb2
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    DeviceState,
    Pin,
    Release,
    Rollout,
    RolloutDevice,
    Student,
)
from ebbflow.cloud.rollout import facts, machine, reconcile, selector
from ebbflow.cloud.rollout.locking import lock
from ebbflow.cloud.rollout.state import Device, Step

_Act = Callable[[facts.Facts, Device], Device]
_PRECISIONS = ("bf16", "int8", "int4")
"""Kinds of targets that are weights, in the order in which evaluation cards list them."""


def tell(session: Session, agent_id: str, now: dt.datetime) -> None:
    """Notes that an agent has read its desired state; one that no rollout knows yet is brought to its notice."""
    for row in untold(session, agent_id, now):
        lock(session, row.student_id)
        session.refresh(row)
        _advance(session, row, agent_id, lambda known, device: machine.tell(known.rollout, device, now), now)
        if session.get(RolloutDevice, (row.id, agent_id)) is None and row.due_time is not None:
            reconcile.wake(row, now)


def untold(session: Session, agent_id: str, now: dt.datetime | None = None) -> Sequence[Rollout]:
    """Rollouts to which it is news that an agent reads its desired state.

    Those that have begun for it without its having been told, once its turn has come, and those that have not taken it
    in yet.

    Args:
        session: where to ask.
        agent_id: the agent.
        now: the time; without it a turn that has still to come counts too.
    """
    device = RolloutDevice
    turn = [] if now is None else [device.not_before_time <= now]
    begun = sa.and_(
        device.state == DeviceState.WAITING,
        device.phase <= Rollout.phase_index,
        Rollout.state.in_(machine.HANDING_OUT),
        *turn,
    )
    query = (
        sa.select(Rollout, device.agent_id, Student.selector)
        .join(Student, Student.id == Rollout.student_id)
        .outerjoin(device, sa.and_(device.rollout_id == Rollout.id, device.agent_id == agent_id))
        .where(Rollout.due_time.is_not(None), sa.or_(begun, device.agent_id.is_(None)))
        .order_by(Rollout.student_id)  # the order in which `tell` locks
    )
    found = session.execute(query).all()
    agent = session.get(Agent, agent_id) if found else None
    if agent is None or agent.state is not AgentState.ACTIVE:
        return []
    pinned = set(session.scalars(sa.select(Pin.student_id).where(Pin.agent_id == agent_id)))
    return [
        row
        for row, enlisted, selected in found
        if row.student_id not in pinned and (enlisted or selector.matches(selector.parse(selected), agent.labels))
    ]


def fetching(
    session: Session,
    agent_id: str,
    student_id: str,
    number: int,
    now: dt.datetime,
    resume_time: dt.datetime | None = None,
) -> None:
    """Notes that an agent is fetching a release, or goes on at `resume_time`: silence counts from then."""

    def act(known: facts.Facts, device: Device) -> Device:
        return machine.fetching(known.rollout, device, now, resume_time)

    _heard(session, agent_id, student_id, number, act, now)


def answer(
    session: Session,
    agent_id: str,
    student_id: str,
    number: int,
    now: dt.datetime,
    *,
    succeeded: bool,
    reason: str = "",
    probe_loss: float | None = None,
    fetched_bytes: int = 0,
    full_bytes: int = 0,
) -> None:
    """Notes what became of a release on an agent's device.

    Args:
        session: the caller's transaction, in which `Assignment.installation` is what the agent reported.
        agent_id: the agent.
        student_id: whose release.
        number: the release's number.
        now: the time.
        succeeded: whether the device serves it.
        reason: why not, as an UPPER_SNAKE word.
        probe_loss: what the device measured in nats per token; None or 0 if it did not.
        fetched_bytes: bytes that came over the network for it, all in all.
        full_bytes: what the full files would have been.
    """

    def act(known: facts.Facts, device: Device) -> Device:
        if device.state is DeviceState.WAITING and machine.desired(known.rollout, device, now) != number:
            return device
        return machine.answer(device, succeeded, now, reason)

    row = _heard(session, agent_id, student_id, number, act, now)
    if row is None:
        return
    reconcile.wake(row, now) if row.due_time is not None else None
    rise = probe_loss - published if probe_loss and (published := _published_loss(session, agent_id, row)) else None
    session.execute(
        sa.update(RolloutDevice)
        .where(RolloutDevice.rollout_id == row.id, RolloutDevice.agent_id == agent_id)
        .where(RolloutDevice.state != DeviceState.WAITING)
        .values(
            probe_loss=sa.func.coalesce(probe_loss or None, RolloutDevice.probe_loss),
            probe_rise=sa.func.coalesce(rise, RolloutDevice.probe_rise),
            fetched_bytes=sa.case(
                (RolloutDevice.fetched_bytes < fetched_bytes, fetched_bytes), else_=RolloutDevice.fetched_bytes
            ),
            full_bytes=sa.case((sa.literal(full_bytes) > 0, full_bytes), else_=RolloutDevice.full_bytes),
        )
    )


def _heard(
    session: Session, agent_id: str, student_id: str, number: int, act: _Act, now: dt.datetime
) -> Rollout | None:
    """Takes a step on the newest rollout that brought a release to an agent; returns it."""
    lock(session, student_id)
    query = (
        sa.select(Rollout)
        .join(RolloutDevice, RolloutDevice.rollout_id == Rollout.id)
        .where(
            RolloutDevice.agent_id == agent_id,
            Rollout.student_id == student_id,
            Rollout.release_number == number,
            Rollout.state.in_(machine.LIVING),
        )
        .order_by(Rollout.ordinal.desc())
        .limit(1)
    )
    row = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if row is not None:
        _advance(session, row, agent_id, act, now)
    return row


def _advance(session: Session, row: Rollout, agent_id: str, act: _Act, now: dt.datetime) -> None:
    """One device's step: nobody else's row is read."""
    deadlines: list[dt.datetime] = []

    def step(known: facts.Facts) -> Step:
        devices = tuple(act(known, device) for device in known.devices)
        if (due := machine.next_due(known.rollout, devices, now)) is not None:
            deadlines.append(due)
        return Step(known.rollout, devices)

    reconcile.change(session, row, step, now, RolloutDevice.agent_id == agent_id)
    if deadlines and row.due_time is not None:
        reconcile.wake(row, deadlines[0])


def _published_loss(session: Session, agent_id: str, row: Rollout) -> float | None:
    """The probe loss with which the precision that an agent runs was published, in nats per token."""
    release = session.get_one(Release, (row.student_id, row.release_number))
    assignment = session.get(Assignment, (agent_id, row.student_id))
    if assignment is None or not release.card:
        return None
    card = json_format.ParseDict(release.card, release_pb2.EvaluationCard(), ignore_unknown_fields=True)
    kinds = {file["kind"] for file in release.targets.values()}
    precisions = [precision for precision in _PRECISIONS if precision in kinds]
    told = str(assignment.installation.get("precision", "")).removeprefix("PRECISION_").lower()
    losses = dict(zip(precisions, card.probe_loss, strict=False))
    return losses.get(told)
