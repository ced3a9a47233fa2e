"""Opens and closes rounds."""

import contextlib
import datetime as dt
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback import cohort, policies, turns, updates
from ebbflow.cloud.feedback.adapters import Average, aggregate_updates
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
DRAFTS = 3
"""How often a round is worked out before it is closed, if updates still come; then while it is, and they wait."""

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


class StaleDraftError(Exception):
    """Updates came or went since a draft was made of them: it says something else than the round would."""


@dataclass(frozen=True)
class Draft:
    """What is found about a round before the transaction that closes it, because it takes longer than one should."""

    suspects: frozenset[str] = frozenset()
    """Agents to leave out: their noise over many rounds is too small."""
    plan: pb.RoundPlan | None = None
    """Of a round of adapter updates."""
    rows: tuple[updates.Row, ...] = ()
    """All the updates that it had."""
    average: Average | None = None
    """Of those whose agents are no suspects; None if nobody has worked it out yet."""


def look(session: Session, round_id: str) -> Draft:
    """Says what a round has, to be asked in a reading transaction; nothing if there is none, or it is closed.

    A batch of votes that comes between this and `close_round` is added up too, and looked at in the next round.
    """
    round_ = session.get(Round, round_id)
    if round_ is None or round_.state is not RoundState.OPEN:
        return Draft()
    plan = plan_of(round_)
    if not plan.HasField("adapter"):
        return Draft(frozenset(under_noised(session, round_)))
    # First: then every agent whose row is in the draft is looked at, and any later row makes the draft stale.
    rows = updates.rows_of(session, round_id)
    return Draft(frozenset(under_noised(session, round_)), plan, rows)


def work_out(draft: Draft, blobs: BlobStore | None) -> Draft:
    """Averages the updates of a draft; one of votes, which are added up as the round closes, stays as it is.

    To be called outside any transaction: with a thousand large updates it takes many seconds.

    Raises:
        EbbflowError: what `updates.average_rows` raises.
    """
    return draft if draft.plan is None else replace(draft, average=_average(draft, draft.plan, blobs))


def _average(draft: Draft, plan: pb.RoundPlan, blobs: BlobStore | None) -> Average:
    rows = [row for row in draft.rows if row.agent_id not in draft.suspects]
    return updates.average_rows(plan, rows, _needed(blobs))


def _needed(blobs: BlobStore | None) -> BlobStore:
    if blobs is None:
        raise ValueError("adapter updates need a blob store")
    return blobs


def close_round(session: Session, round_id: str, blobs: BlobStore | None = None, draft: Draft | None = None) -> Round:
    """Takes no more batches and aggregates those that were kept. A round that is closed stays as it is.

    Args:
        session: a writing transaction.
        round_id: which.
        blobs: where adapter updates are and their average goes; votes need none.
        draft: what `look` found and `work_out` completed. What it lacks is worked out here, while others wait.

    Raises:
        StaleDraftError: the round is open and has other updates than those of the draft's average.
        EbbflowError: ROUND_NOT_FOUND; for adapter updates DISK_FULL and what `work_out` raises.
    """
    round_ = find(session, round_id, for_update=True)
    if round_.state == RoundState.OPEN:
        found = look(session, round_id) if draft is None else draft
        round_.aggregate = json_format.MessageToDict(_aggregate(session, round_, blobs, found))
        round_.state = RoundState.CLOSED
        changes.bump(session, "plan")
        session.flush()
    return round_


def _aggregate(session: Session, round_: Round, blobs: BlobStore | None, draft: Draft) -> round_pb2.Aggregate:
    plan = plan_of(round_)
    if plan.HasField("adapter"):
        rows = updates.rows_of(session, round_.id)
        if draft.average is not None and rows != draft.rows:
            raise StaleDraftError
        average = draft.average or _average(replace(draft, rows=rows), plan, blobs)
        result = aggregate_updates(plan, average, _needed(blobs))
    else:
        query = sa.select(FeedbackBatch.agent_id, FeedbackBatch.noisy).where(FeedbackBatch.round_id == round_.id)
        batches = session.execute(query.execution_options(yield_per=500))
        result = aggregate(plan, (noisy for agent_id, noisy in batches if agent_id not in draft.suspects))
    result.under_noised_agents.extend(names.make("agents", agent_id) for agent_id in sorted(draft.suspects))
    return result


def overdue(session: Session, now: dt.datetime) -> list[str]:
    """Returns the ids of the open rounds whose time is over, oldest first."""
    query = sa.select(Round.id).where(Round.state == RoundState.OPEN, Round.end_time <= now).order_by(Round.end_time)
    return list(session.scalars(query))


def close_overdue(registry: Registry, now: dt.datetime, blobs: BlobStore | None = None) -> list[str]:
    """Closes the rounds whose time is over, each in a transaction of its own; returns their ids.

    One that cannot be closed is logged and stays open until the next call; the others close all the same.
    """
    with registry.reading() as session:
        due = overdue(session, now)
    return turns.each("closing", due, lambda round_id: _close(registry, round_id, blobs))


def _close(registry: Registry, round_id: str, blobs: BlobStore | None) -> bool:
    for ahead in (*[True] * DRAFTS, False):
        with registry.reading() as session:
            draft = look(session, round_id)
        if ahead:
            draft = work_out(draft, blobs)
        with contextlib.suppress(StaleDraftError), registry.transaction() as session:
            close_round(session, round_id, blobs, draft)
            break
    return True


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
