"""Opens and closes rounds."""

import datetime as dt
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback import cohort, policies
from ebbflow.cloud.feedback.adapters import aggregate_updates
from ebbflow.cloud.feedback.aggregate import aggregate, pool
from ebbflow.cloud.feedback.plans import DEFAULT_MAX_USERS, DEFAULT_NEAR_MICRO, PlanSigner, Timing, make_plan
from ebbflow.cloud.feedback.round_rows import aggregate_of, find, plan_of
from ebbflow.cloud.feedback.suspects import under_noised
from ebbflow.cloud.registry import changes
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    FeedbackBatch,
    FeedbackRefusal,
    Round,
    RoundMember,
    RoundState,
    Student,
)
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.accounting import epsilon_of
from ebbflow.common.privacy.calibration import calibrate
from ebbflow.common.privacy.composition import within
from ebbflow.common.privacy.windows import window_end, window_start

DEFAULT_DURATION = dt.timedelta(days=1)
DEFAULT_LOOKBACK = dt.timedelta(days=7)

AdapterMaker = Callable[[pb.PrivacyPolicy, Sequence[cohort.Member]], pb.AdapterPlan]
"""Makes the plan of a round of adapter updates for a policy and a cohort, or refuses: too few agents for a signal."""


def of_window(session: Session, round_: Round) -> round_pb2.Aggregate:
    """Returns what a closed round of votes says, added up with the closed rounds of its window that asked the same.

    Those are of the same student, about the same bins, and were opened before it. The window's epsilon is spent on all
    of them, and adding up what they said costs no more of it.

    Args:
        session: a transaction.
        round_: closed, and none of adapter updates.
    """
    query = (
        sa.select(Round)
        .where(Round.student_id == round_.student_id, Round.state == RoundState.CLOSED, Round.window == round_.window)
        .where(Round.create_time <= round_.create_time, Round.id != round_.id)
        .order_by(Round.create_time, Round.id)
    )
    asked = _question(plan_of(round_))
    alike = [row for row in session.scalars(query) if _question(plan_of(row)) == asked]
    return pool([aggregate_of(row) for row in (*alike, round_)]) if alike else aggregate_of(round_)


def _question(plan: pb.RoundPlan) -> tuple[list[pb.Bin], int]:
    return list(plan.bins), plan.measure


def epsilon_of_round(round_: Round) -> float:
    """Epsilon of this one round for each user on an agent, at its policy's delta."""
    plan = plan_of(round_)
    return epsilon_of(plan.mechanism.rho_nano, plan.policy.delta)


def _check_budget(session: Session, plan: pb.RoundPlan, student_id: str) -> None:
    """Counts rounds by their end and not by the name of their window, which changes with the policy's window_days."""
    days = plan.policy.window_days
    query = sa.select(Round).where(
        Round.student_id == student_id,
        Round.end_time >= window_start(plan.window),
        Round.end_time < window_end(plan.window, days),
    )
    earlier = [plan_of(round_) for round_ in session.scalars(query)]
    costs = Counter(each.mechanism.rho_nano for each in (*earlier, plan))
    policy = plan.policy
    window = f"the window {plan.window} of {days} days"
    if len(earlier) >= policy.rounds_per_window:
        message = f"{window} has had its rounds: {len(earlier)} of {policy.rounds_per_window}"
        raise EbbflowError(Reason.BUDGET_EXHAUSTED, message, window=plan.window)
    spent = sum(cost * rounds for cost, rounds in costs.items())
    if spent > policy.rho_cap_nano or not within(costs, policy.epsilon, policy.delta):
        message = f"{window} had {len(earlier)} rounds that leave too little of what the policy allows now"
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
    measure: "pb.RoundPlan.Measure.ValueType" = pb.RoundPlan.MEASURE_UNSPECIFIED,
    near_micro: int = DEFAULT_NEAR_MICRO,
    adapter: AdapterMaker | None = None,
) -> Round:
    """Signs a plan and freezes the cohort: every agent that serves the student is to report, used or not.

    Args:
        session: a writing transaction.
        student: whose users vote.
        bins: from `plans.read_bins` or `population.bins`, read before the transaction began.
        signer: the feedback key.
        now: when the round opens.
        duration: how long batches are taken.
        lookback: how far back interactions may lie.
        metrics: counters to collect besides the votes; each one costs noise on every cell.
        max_users: largest count that one agent may report in a cell.
        measure: how agents liken texts to bins.
        near_micro: least cosine, in millionths, that KIND_NEAR counts.
        adapter: asks for adapter updates and not for votes; then there are neither bins nor metrics.

    Raises:
        EbbflowError: BUDGET_EXHAUSTED if the window has had its rounds; STATE_CONFLICT, IDENTITY_WAITS or
            LIFETIME_EXHAUSTED if no agent may be asked; INVALID_REQUEST, PLAN_INVALID; what `adapter` raises.
    """
    policies.lock(session, student.id)
    version = policies.current(session, student, signer, now)
    policy = policies.policy_of(version)
    cost_nano = calibrate(policy.epsilon, policy.delta, policy.rounds_per_window).rho_nano
    members = cohort.choose(session, student, policy, cost_nano, now)
    round_id = secrets.token_hex(6)
    plan = make_plan(
        round_id,
        student.id,
        policies.signed(version),
        bins,
        Timing(now, duration, lookback),
        metrics=metrics,
        max_users=max_users,
        measure=measure,
        near_micro=near_micro,
        adapter=adapter(policy, members) if adapter else None,
    )
    _check_budget(session, plan, student.id)
    return _record(session, student.id, plan, signer, members, now)


def _record(
    session: Session,
    student_id: str,
    plan: pb.RoundPlan,
    signer: PlanSigner,
    members: Sequence[cohort.Member],
    now: dt.datetime,
) -> Round:
    signed = signer.sign(plan)
    round_ = Round(
        id=names.parse(plan.round, "rounds"),
        student_id=student_id,
        state=RoundState.OPEN,
        plan=signed.plan,
        signature=signed.signature,
        key_id=signed.key_id,
        window=plan.window,
        end_time=plan.end_time.ToDatetime(dt.UTC),
        create_time=now,
    )
    session.add(round_)
    session.flush()
    session.execute(
        sa.insert(RoundMember), [{"round_id": round_.id, "agent_id": member.agent_id} for member in members]
    )
    changes.bump(session, "plan")
    return round_


def close_round(
    session: Session, round_id: str, blobs: BlobStore | None = None, suspects: Collection[str] | None = None
) -> Round:
    """Takes no more batches and aggregates those that were kept. A round that is closed stays as it is.

    Args:
        session: a writing transaction.
        round_id: which.
        blobs: where adapter updates are and their average goes; votes need none.
        suspects: agents to leave out, from `find_suspects`, which takes longer than a transaction should; None asks it.

    Raises:
        EbbflowError: ROUND_NOT_FOUND.
    """
    round_ = find(session, round_id, for_update=True)
    if round_.state == RoundState.OPEN:
        found = under_noised(session, round_) if suspects is None else suspects
        round_.aggregate = json_format.MessageToDict(_aggregate(session, round_, blobs, found))
        round_.state = RoundState.CLOSED
        changes.bump(session, "plan")
        session.flush()
    return round_


def find_suspects(session: Session, round_id: str) -> set[str]:
    """Returns the agents whose batches a round should not add up; empty if there is no such round, or it is closed.

    To be asked in a reading transaction before `close_round`. A batch that comes in between is looked at in the next
    round.
    """
    round_ = session.get(Round, round_id)
    return under_noised(session, round_) if round_ is not None and round_.state is RoundState.OPEN else set()


def _aggregate(
    session: Session, round_: Round, blobs: BlobStore | None, suspects: Collection[str]
) -> round_pb2.Aggregate:
    plan = plan_of(round_)
    if plan.HasField("adapter"):
        if blobs is None:
            raise ValueError("adapter updates need a blob store")
        result = aggregate_updates(session, blobs, round_, suspects)
    else:
        query = sa.select(FeedbackBatch.agent_id, FeedbackBatch.noisy).where(FeedbackBatch.round_id == round_.id)
        rows = session.execute(query.execution_options(yield_per=500))
        result = aggregate(plan, (noisy for agent_id, noisy in rows if agent_id not in suspects))
    result.under_noised_agents.extend(names.make("agents", agent_id) for agent_id in sorted(suspects))
    return result


def overdue(session: Session, now: dt.datetime) -> list[str]:
    """Returns the ids of the open rounds whose time is over, oldest first."""
    query = sa.select(Round.id).where(Round.state == RoundState.OPEN, Round.end_time <= now).order_by(Round.end_time)
    return list(session.scalars(query))


def close_overdue(registry: Registry, now: dt.datetime, blobs: BlobStore | None = None) -> list[str]:
    """Closes the rounds whose time is over, each in a transaction of its own; returns their ids."""
    with registry.reading() as session:
        due = {round_id: find_suspects(session, round_id) for round_id in overdue(session, now)}
    for round_id, suspects in due.items():
        with registry.transaction() as session:
            close_round(session, round_id, blobs, suspects)
    return list(due)


def waiting_for(session: Session, agent_id: str, now: dt.datetime) -> list[str]:
    """Returns the ids of the open rounds that an agent belongs to and has not answered, oldest first.

    A batch that was kept or refused is the agent's last word in its round, and among its charges (`charges.known`): a
    device whose disk was restored learns from there that it has answered. What was refused before anybody knew its
    round is no answer, and the device sends what waits without the plan.
    """
    # As a condition and not as a join: few rounds are open, and an agent has been a member of many.
    asked = sa.exists().where(RoundMember.round_id == Round.id, RoundMember.agent_id == agent_id)
    kept = sa.exists().where(FeedbackBatch.round_id == Round.id, FeedbackBatch.agent_id == agent_id)
    refused = sa.exists().where(FeedbackRefusal.round_id == Round.id, FeedbackRefusal.agent_id == agent_id)
    query = (
        sa.select(Round.id)
        .where(Round.state == RoundState.OPEN, Round.end_time > now, asked, ~kept, ~refused)
        .order_by(Round.create_time, Round.id)
    )
    return list(session.scalars(query))


def signed_plans(session: Session, round_ids: Sequence[str]) -> list[pb.SignedPlan]:
    """Returns the plans of some rounds as they were signed, oldest first."""
    query = sa.select(Round).where(Round.id.in_(round_ids)).order_by(Round.create_time, Round.id)
    return [pb.SignedPlan(plan=row.plan, signature=row.signature, key_id=row.key_id) for row in session.scalars(query)]


def counts(session: Session, round_ids: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Returns cohort, batches kept and batches refused of some rounds, by id."""
    columns = (RoundMember.round_id, FeedbackBatch.round_id, FeedbackRefusal.round_id)
    tallies: list[dict[str, int]] = []
    for column in columns:
        query = sa.select(column, sa.func.count()).where(column.in_(round_ids)).group_by(column)
        tallies.append({row[0]: row[1] for row in session.execute(query)})
    cohort, kept, refused = tallies
    return {id_: (cohort.get(id_, 0), kept.get(id_, 0), refused.get(id_, 0)) for id_ in round_ids}
