"""What a round's privatised counters say of the devices that serve a rollout's release, against all others.

Only what the batches hold is used, so it costs no privacy. A batch speaks of what its device's users made of answers
from the plan's start until the batch; it speaks of the release if the device served it for most of that time.
"""

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback import shares
from ebbflow.cloud.feedback.round_rows import plan_of
from ebbflow.cloud.feedback.rounds import counts
from ebbflow.cloud.registry.tables import (
    Assignment,
    DeviceState,
    FeedbackBatch,
    Rollout,
    RolloutDevice,
    Round,
    RoundState,
)
from ebbflow.cloud.rollout.state import Acceptance
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.vector import layout_of

COMPLETE_SHARE = 0.9
"""Share of an open round's cohort whose batches must be in: to look at every new batch would be to ask too often."""
ROUNDS = 4
"""How many rounds are looked at for one that is complete enough, newest first."""
_KINDS = (pb.Metric.KIND_ACCEPTED, pb.Metric.KIND_FAILED)


@dataclass(frozen=True)
class Evidence:
    """One device's batch."""

    report: shares.Report
    phase: int | None
    """Phase by which the device came to serve the release; None if it serves another one."""


def judge(evidence: Sequence[Evidence], noise: shares.Noise, phase: int, tolerance: float) -> Acceptance | None:
    """Compares a phase's devices with those that serve another release.

    Args:
        evidence: every batch of a round that speaks of one release.
        noise: what each of them carries.
        phase: index of the phase.
        tolerance: how much lower the share of good outcomes may be.

    Returns:
        What the counters say; None if there are too few devices to compare.
    """
    ours = [each.report for each in evidence if each.phase == phase]
    others = [each.report for each in evidence if each.phase is None]
    if min(len(ours), len(others)) < shares.LEAST_DEVICES:
        return None
    found = shares.compare(ours, others, noise)
    return Acceptance(
        rate=found.share,
        elsewhere=found.elsewhere,
        drop_significant=found.exceeds(tolerance),
        informative=found.informs(tolerance),
    )


def served_mostly(start: dt.datetime, since: dt.datetime, end: dt.datetime) -> bool:
    """Whether a device that serves a release `since` then did so for more than half of the time from start to end."""
    return end - since > since - start


class Outcomes:
    """Reads outcomes off the batches of a plan: its metrics if it counts both kinds, otherwise all votes together.

    Attributes:
        noise: what every report carries.
    """

    def __init__(self, plan: pb.RoundPlan) -> None:
        """Finds the cells."""
        layout, variance = layout_of(plan), float(variance_of(plan.mechanism))
        kinds = [metric.kind for metric in plan.metrics]
        begins, width, cap = [0, layout.bins], layout.bins, 1
        if all(kind in kinds for kind in _KINDS):
            metrics = [kinds.index(kind) for kind in _KINDS]
            begins, width = [2 * layout.bins + at for at in metrics], 1
            cap = max(plan.metrics[at].cap for at in metrics)
        self.noise = shares.Noise(variance * width, variance * width, cap)
        self._good, self._failed = (slice(begin, begin + width) for begin in begins)

    def report(self, noisy: Sequence[int]) -> shares.Report:
        """Good and failed outcomes in one batch."""
        return sum(noisy[self._good]), sum(noisy[self._failed])


def measure(session: Session, row: Rollout, tolerances: Sequence[float]) -> list[Acceptance | None]:
    """Returns what the newest usable round says of each phase; None where nobody looks or there is nothing to say.

    Args:
        session: where to ask.
        row: the rollout.
        tolerances: by phase, how much lower the share of good outcomes may be; 0 does not look.
    """
    looking = [index for index, tolerance in enumerate(tolerances) if tolerance > 0 and index <= row.phase_index]
    round_ = _newest(session, row) if looking else None
    found: list[Acceptance | None] = [None] * len(tolerances)
    if round_ is not None:
        outcomes = Outcomes(plan_of(round_))
        evidence = list(_evidence(session, row, round_, outcomes))
        for index in looking:
            found[index] = judge(evidence, outcomes.noise, index, tolerances[index])
    return found


def _newest(session: Session, row: Rollout) -> Round | None:
    """The newest round that took batches since the rollout began, and is closed or nearly complete."""
    query = sa.select(Round).where(Round.student_id == row.student_id, Round.end_time > row.create_time)
    newest = session.scalars(query.order_by(Round.create_time.desc()).limit(ROUNDS))
    rounds = [round_ for round_ in newest if not plan_of(round_).HasField("adapter")]
    tally = counts(session, [round_.id for round_ in rounds])
    for round_ in rounds:
        cohort, kept, _ = tally[round_.id]
        if kept and (round_.state is RoundState.CLOSED or kept >= COMPLETE_SHARE * cohort):
            return round_
    return None


def _evidence(session: Session, row: Rollout, round_: Round, outcomes: Outcomes) -> Iterable[Evidence]:
    start = plan_of(round_).start_time.ToDatetime(dt.UTC)
    device = RolloutDevice
    of_rollout = sa.and_(device.rollout_id == row.id, device.agent_id == FeedbackBatch.agent_id)
    of_student = sa.and_(Assignment.student_id == row.student_id, Assignment.agent_id == FeedbackBatch.agent_id)
    query = (
        sa.select(
            FeedbackBatch.noisy,
            FeedbackBatch.create_time,
            device.phase,
            device.state,
            device.answer_time,
            device.previous_number,
            Assignment.serving_number,
        )
        .outerjoin(device, of_rollout)
        .outerjoin(Assignment, of_student)
        .where(FeedbackBatch.round_id == round_.id)
        .execution_options(yield_per=500)
    )
    for found in session.execute(query):
        if not found.noisy:  # beyond its retention
            continue
        knows, phase = _side(row.release_number, start, found)
        if knows:
            yield Evidence(outcomes.report(found.noisy), phase)


def _side(number: int, start: dt.datetime, found: Any) -> tuple[bool, int | None]:
    """Whether a batch speaks of one release alone, and the phase by which its device came to serve the rollout's."""
    came = found.answer_time if found.state is DeviceState.SUCCEEDED else None
    if number == found.previous_number or (found.serving_number == number) != (came is not None):
        return False, None
    if came is None or came >= found.create_time:
        return True, None
    return served_mostly(start, came, found.create_time), found.phase
