"""Opens and closes rounds."""

import datetime as dt
import secrets
from collections.abc import Sequence

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback import policies
from ebbflow.cloud.feedback.aggregate import aggregate
from ebbflow.cloud.feedback.plans import DEFAULT_MAX_USERS, PlanSigner, Timing, make_plan
from ebbflow.cloud.registry import changes, locks
from ebbflow.cloud.registry.tables import (
    Agent,
    AgentState,
    Assignment,
    FeedbackBatch,
    FeedbackRefusal,
    Round,
    RoundMember,
    RoundState,
    Student,
)
from ebbflow.cloud.rollout import selector
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.accounting import epsilon_of

DEFAULT_DURATION = dt.timedelta(days=1)
DEFAULT_LOOKBACK = dt.timedelta(days=7)


def plan_of(round_: Round) -> pb.RoundPlan:
    """Returns the plan of a round."""
    return pb.RoundPlan.FromString(round_.plan)


def aggregate_of(round_: Round) -> round_pb2.Aggregate:
    """Returns what came of a round; empty until it is closed."""
    return json_format.ParseDict(round_.aggregate, round_pb2.Aggregate(), ignore_unknown_fields=True)


def epsilon_of_round(round_: Round) -> float:
    """Epsilon of this one round for each user on an agent, at its policy's delta."""
    plan = plan_of(round_)
    return epsilon_of(plan.mechanism.rho_nano, plan.policy.delta)


def _cohort(session: Session, student: Student) -> list[str]:
    """Returns the agents that serve the student now. Whether anybody uses it there plays no part."""
    wanted = selector.parse(student.selector)
    query = (
        sa.select(Agent.id)
        .join(Assignment, Assignment.agent_id == Agent.id)
        .where(Agent.state == AgentState.ACTIVE)
        .where(Assignment.student_id == student.id, Assignment.serving_number.is_not(None))
        .where(*selector.clauses(wanted))
        .order_by(Agent.id)
    )
    return list(session.scalars(query))


def _check_budget(session: Session, plan: pb.RoundPlan, student_id: str) -> None:
    query = sa.select(Round).where(Round.student_id == student_id, Round.window == plan.window)
    earlier = [plan_of(round_) for round_ in session.scalars(query)]
    spent = sum(before.mechanism.rho_nano for before in earlier)
    policy = plan.policy
    if len(earlier) >= policy.rounds_per_window or spent + plan.mechanism.rho_nano > policy.rho_cap_nano:
        message = (
            f"the window {plan.window} of {policy.window_days} days has had its rounds:"
            f" {len(earlier)} of {policy.rounds_per_window}"
        )
        raise EbbflowError(Reason.BUDGET_EXHAUSTED, message, window=plan.window)


def open_round(
    session: Session,
    student: Student,
    bins: Sequence[pb.Bin],
    signer: PlanSigner,
    now: dt.datetime,
    duration: dt.timedelta = DEFAULT_DURATION,
    lookback: dt.timedelta = DEFAULT_LOOKBACK,
    *,
    metrics: Sequence[pb.Metric] = (),
    max_users: int = DEFAULT_MAX_USERS,
) -> Round:
    """Signs a plan and freezes the cohort: every agent that serves the student is to report, used or not.

    Args:
        session: a writing transaction.
        student: whose users vote.
        bins: from `plans.read_bins`, read before the transaction began.
        signer: the feedback key.
        now: when the round opens.
        duration: how long batches are taken.
        lookback: how far back interactions may lie.
        metrics: counters to collect besides the votes; each one costs noise on every cell.
        max_users: largest count that one agent may report in a cell.

    Raises:
        EbbflowError: BUDGET_EXHAUSTED if the window has had its rounds; STATE_CONFLICT if no agent serves the student;
            INVALID_REQUEST, PLAN_INVALID.
    """
    locks.exclusive(session, f"rounds of students/{student.id}")
    policy = policies.signed(policies.current(session, student, signer, now))
    round_id = secrets.token_hex(6)
    timing = Timing(now, duration, lookback)
    plan = make_plan(round_id, student.id, policy, bins, timing, metrics=metrics, max_users=max_users)
    _check_budget(session, plan, student.id)
    cohort = _cohort(session, student)
    if not cohort:
        message = f"no agent serves students/{student.id} yet: start a rollout before the round"
        raise EbbflowError(Reason.STATE_CONFLICT, message, student=student.id)
    signed = signer.sign(plan)
    round_ = Round(
        id=round_id,
        student_id=student.id,
        state=RoundState.OPEN,
        plan=signed.plan,
        signature=signed.signature,
        key_id=signed.key_id,
        window=plan.window,
        end_time=now + duration,
        create_time=now,
    )
    session.add(round_)
    session.flush()
    session.add_all(RoundMember(round_id=round_id, agent_id=agent_id) for agent_id in cohort)
    changes.bump(session, "plan")
    return round_


def close_round(session: Session, round_id: str) -> Round:
    """Takes no more batches and aggregates those that were kept. A round that is closed stays as it is.

    Raises:
        EbbflowError: ROUND_NOT_FOUND.
    """
    round_ = session.get(Round, round_id, with_for_update=True, populate_existing=True)
    if round_ is None:
        raise EbbflowError(Reason.ROUND_NOT_FOUND, f"there is no round rounds/{round_id}", round=round_id)
    if round_.state == RoundState.OPEN:
        reports = session.scalars(
            sa.select(FeedbackBatch.noisy).where(FeedbackBatch.round_id == round_id).execution_options(yield_per=500)
        )
        round_.aggregate = json_format.MessageToDict(aggregate(plan_of(round_), reports))
        round_.state = RoundState.CLOSED
        changes.bump(session, "plan")
        session.flush()
    return round_


def close_overdue(session: Session, now: dt.datetime) -> list[str]:
    """Closes the rounds whose time is over; returns their ids. One step of the server's tick."""
    query = sa.select(Round.id).where(Round.state == RoundState.OPEN, Round.end_time <= now).order_by(Round.end_time)
    return [close_round(session, round_id).id for round_id in session.scalars(query).all()]


def current_plans(session: Session, agent_id: str, now: dt.datetime) -> list[pb.SignedPlan]:
    """Returns the signed plans of the open rounds that an agent belongs to, oldest first."""
    query = (
        sa.select(Round)
        .join(RoundMember, RoundMember.round_id == Round.id)
        .where(RoundMember.agent_id == agent_id, Round.state == RoundState.OPEN, Round.end_time > now)
        .order_by(Round.create_time, Round.id)
    )
    rounds = session.scalars(query)
    return [pb.SignedPlan(plan=row.plan, signature=row.signature, key_id=row.key_id) for row in rounds]


def counts(session: Session, round_ids: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Returns cohort, batches kept and batches refused of some rounds, by id."""
    columns = (RoundMember.round_id, FeedbackBatch.round_id, FeedbackRefusal.round_id)
    tallies: list[dict[str, int]] = []
    for column in columns:
        query = sa.select(column, sa.func.count()).where(column.in_(round_ids)).group_by(column)
        tallies.append({row[0]: row[1] for row in session.execute(query)})
    cohort, kept, refused = tallies
    return {id_: (cohort.get(id_, 0), kept.get(id_, 0), refused.get(id_, 0)) for id_ in round_ids}
