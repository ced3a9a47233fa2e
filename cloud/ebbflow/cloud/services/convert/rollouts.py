"""Rollouts."""

import datetime as dt
from collections.abc import Iterable, Mapping

from google.protobuf import duration_pb2

from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.cloud.registry.tables import DeviceState, OnHalt, Rollout, RolloutState
from ebbflow.cloud.rollout import advice, wire
from ebbflow.cloud.rollout.results import Failure, PhaseResult, Results
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.rollout.state import Decision
from ebbflow.cloud.rollout.store import Preview
from ebbflow.cloud.services.convert.common import from_json, timestamp
from ebbflow.common import names

STATES = {
    RolloutState.WAITING_FOR_APPROVAL: pb.Rollout.STATE_WAITING_FOR_APPROVAL,
    RolloutState.RUNNING: pb.Rollout.STATE_RUNNING,
    RolloutState.PAUSED: pb.Rollout.STATE_PAUSED,
    RolloutState.HALTED: pb.Rollout.STATE_HALTED,
    RolloutState.SUCCEEDED: pb.Rollout.STATE_SUCCEEDED,
    RolloutState.ABORTED: pb.Rollout.STATE_ABORTED,
    RolloutState.SUPERSEDED: pb.Rollout.STATE_SUPERSEDED,
}
ON_HALT = {OnHalt.HOLD: pb.ON_HALT_HOLD, OnHalt.ROLL_BACK: pb.ON_HALT_ROLL_BACK}
_DIGITS = 6
"""Of a mean rise in nats: its last bits depend on the order in which a database adds up."""


def rollout(row: Rollout, results: Results, now: dt.datetime) -> pb.Rollout:
    """A rollout with what came of it so far."""
    return pb.Rollout(
        name=names.make("rollouts", row.id),
        release=names.release(row.student_id, row.release_number),
        state=STATES[row.state],
        phases=[from_json(phase, pb.Phase) for phase in row.phases],
        phase_index=row.phase_index,
        reason=row.reason,
        counts=_counts(phase.counts for phase in results.phases),
        create_time=timestamp(row.create_time),
        update_time=timestamp(row.update_time),
        windows=[from_json(window, pb.MaintenanceWindow) for window in row.windows],
        spread=_duration(row.spread_s),
        on_halt=ON_HALT[row.on_halt],
        creator=row.creator,
        approver=row.approver,
        results=map(_phase_result, results.phases),
        next_decision=_next_decision(results.next_decision, now),
        failures=map(_failure, results.failures),
        fetched_bytes=results.fetched_bytes,
        full_bytes=results.full_bytes,
    )


def preview(spec: RolloutSpec, found: Preview, failure_rate: float) -> pb.PreviewRolloutResponse:
    """What a rollout would begin with, and what its phases can show."""
    state = pb.Rollout.STATE_WAITING_FOR_APPROVAL if spec.approval_required else pb.Rollout.STATE_RUNNING
    return pb.PreviewRolloutResponse(
        rollout=pb.Rollout(
            release=names.release(spec.student_id, spec.number),
            state=state,
            phases=map(wire.message_of, found.phases),
            windows=map(wire.window_message, spec.windows),
            spread=_duration(spec.spread_s),
            on_halt=ON_HALT[spec.on_halt],
            creator=spec.creator,
        ),
        outlooks=[
            pb.PhaseOutlook(
                agents=members, connected=connected, detectable_failure_rate=advice.detectable_rate(members)
            )
            for members, connected in zip(found.members, found.connected, strict=True)
        ],
        advised_canaries=advice.agents_needed(failure_rate),
    )


def _phase_result(result: PhaseResult) -> pb.PhaseResult:
    seen = result.acceptance
    return pb.PhaseResult(
        counts=_counts([result.counts]),
        probe_rise=round(result.probe_rise, _DIGITS),
        acceptance=seen.rate if seen else 0.0,
        acceptance_elsewhere=seen.elsewhere if seen else 0.0,
        acceptance_informative=seen is not None and seen.informative,
        soak_end_time=timestamp(result.soak_end_time),
    )


def _next_decision(decision: Decision, now: dt.datetime) -> pb.NextDecision:
    """What comes next. A time that is already here is left out: a watch would take each look for news."""
    earliest = decision.earliest_time
    return pb.NextDecision(
        action=decision.action,
        reason=decision.reason,
        earliest_time=timestamp(earliest) if earliest is not None and earliest > now else None,
    )


def _failure(failure: Failure) -> pb.Failure:
    agents = [names.make("agents", agent_id) for agent_id in failure.agents]
    return pb.Failure(reason=failure.reason, count=failure.count, agents=agents)


def _counts(phases: Iterable[Mapping[DeviceState, int]]) -> pb.DeviceCounts:
    total = dict.fromkeys(DeviceState, 0)
    for counts in phases:
        for state, count in counts.items():
            total[state] += count
    return pb.DeviceCounts(**{state.value: count for state, count in total.items()})


def _duration(seconds: float) -> duration_pb2.Duration:
    message = duration_pb2.Duration()
    message.FromTimedelta(dt.timedelta(seconds=seconds))
    return message
