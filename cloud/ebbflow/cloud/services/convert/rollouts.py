"""Rollouts."""

from collections.abc import Mapping

from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.cloud.registry.tables import DeviceState, Rollout, RolloutState
from ebbflow.cloud.services.convert.common import from_json, timestamp
from ebbflow.common import names

STATES = {
    RolloutState.RUNNING: pb.Rollout.STATE_RUNNING,
    RolloutState.PAUSED: pb.Rollout.STATE_PAUSED,
    RolloutState.HALTED: pb.Rollout.STATE_HALTED,
    RolloutState.SUCCEEDED: pb.Rollout.STATE_SUCCEEDED,
    RolloutState.ABORTED: pb.Rollout.STATE_ABORTED,
    RolloutState.SUPERSEDED: pb.Rollout.STATE_SUPERSEDED,
}


def rollout(row: Rollout, counts: Mapping[DeviceState, int]) -> pb.Rollout:
    """A rollout with its devices counted."""
    return pb.Rollout(
        name=names.make("rollouts", row.id),
        release=names.release(row.student_id, row.release_number),
        state=STATES[row.state],
        phases=[from_json(phase, pb.Phase) for phase in row.phases],
        phase_index=row.phase_index,
        reason=row.reason,
        counts=pb.DeviceCounts(**{state.value: count for state, count in counts.items()}),
        create_time=timestamp(row.create_time),
        update_time=timestamp(row.update_time),
    )
