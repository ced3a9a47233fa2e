"""What somebody asks for when a rollout starts: the request, and the student's policy where that says nothing."""

import datetime as dt
from collections.abc import Iterable

from google.protobuf import duration_pb2

from ebbflow.api.v1 import rollout_pb2, student_pb2
from ebbflow.cloud.registry.tables import OnHalt, Student
from ebbflow.cloud.rollout import spec, wire
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.rollout.windows import Window
from ebbflow.cloud.services.convert.common import from_json
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

ON_HALT = {rollout_pb2.ON_HALT_HOLD: OnHalt.HOLD, rollout_pb2.ON_HALT_ROLL_BACK: OnHalt.ROLL_BACK}
MOST_KEPT_RELEASES = 1000


def of(wanted: rollout_pb2.Rollout, student: Student, creator: str) -> RolloutSpec:
    """Returns a checked specification.

    Args:
        wanted: what the request says.
        student: the release's student.
        creator: resource name of the caller.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field.
    """
    policy = from_json(student.rollout_policy, student_pb2.RolloutPolicy)
    _, number = names.parse_release(wanted.release)
    found = RolloutSpec(
        student_id=student.id,
        number=number,
        phases=_phases(wanted.phases or policy.phases),
        windows=_windows(wanted.windows or policy.windows),
        spread_s=_span(wanted.spread if wanted.HasField("spread") else policy.spread, "spread").total_seconds(),
        on_halt=_on_halt(wanted.on_halt or policy.on_halt),
        creator=creator,
        approval_required=policy.approval_required,
    )
    spec.check(found)
    return found


def check_policy(policy: student_pb2.RolloutPolicy) -> student_pb2.RolloutPolicy:
    """Returns a policy if a rollout could keep to it.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field.
    """
    wanted = RolloutSpec(
        student_id="",
        number=1,
        phases=_phases(policy.phases),
        windows=_windows(policy.windows),
        spread_s=_span(policy.spread, "spread").total_seconds(),
        on_halt=_on_halt(policy.on_halt),
    )
    spec.check(wanted)
    if policy.kept_releases > MOST_KEPT_RELEASES:
        message = f"kept_releases is at most {MOST_KEPT_RELEASES}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="kept_releases")
    return policy


def _phases(messages: Iterable[rollout_pb2.Phase]) -> tuple[Phase, ...]:
    found = []
    for index, message in enumerate(messages):
        for field in ("soak", "silence_limit"):
            _span(getattr(message, field), f"phases[{index}].{field}")
        found.append(wire.phase_of(message))
    return tuple(found)


def _windows(messages: Iterable[rollout_pb2.MaintenanceWindow]) -> tuple[Window, ...]:
    found = []
    for index, message in enumerate(messages):
        _span(message.duration, f"windows[{index}].duration")
        found.append(wire.window_of(message))
    return tuple(found)


def _on_halt(value: "rollout_pb2.OnHalt.ValueType") -> OnHalt:
    if value and value not in ON_HALT:
        raise EbbflowError(Reason.INVALID_REQUEST, f"on_halt has no value {value}", field="on_halt")
    return ON_HALT.get(value, OnHalt.HOLD)


def _span(message: duration_pb2.Duration, field: str) -> dt.timedelta:
    """A duration; one that a calendar cannot hold, or whose parts have two signs, is refused."""
    try:
        message.ToJsonString()  # checks the rules of Duration
        return message.ToTimedelta()
    except (OverflowError, ValueError):
        raise EbbflowError(Reason.INVALID_REQUEST, f"{field} is out of range", field=field) from None
