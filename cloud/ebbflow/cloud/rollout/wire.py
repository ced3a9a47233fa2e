"""Phases and windows as messages and as the JSON that the registry keeps."""

from typing import Any

from google.protobuf import json_format

from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.cloud.rollout.phases import DEFAULT_SILENCE_LIMIT, Phase
from ebbflow.cloud.rollout.windows import Window


def phase_of(message: pb.Phase) -> Phase:
    """Reads a phase; zeros take the defaults that the contract names."""
    return Phase(
        share=message.share,
        count=message.count,
        selector=message.selector,
        success_share=message.success_share or 1.0,
        failure_share=message.failure_share,
        min_answers=message.min_answers or 1,
        soak=message.soak.ToTimedelta(),
        silence_limit=message.silence_limit.ToTimedelta()
        if message.HasField("silence_limit")
        else DEFAULT_SILENCE_LIMIT,
        max_probe_rise=message.max_probe_rise,
        max_acceptance_drop=message.max_acceptance_drop,
    )


def message_of(phase: Phase) -> pb.Phase:
    """Writes a phase with every default spelled out."""
    message = pb.Phase(
        share=phase.share,
        count=phase.count,
        selector=phase.selector,
        success_share=phase.success_share,
        failure_share=phase.failure_share,
        min_answers=phase.min_answers,
        max_probe_rise=phase.max_probe_rise,
        max_acceptance_drop=phase.max_acceptance_drop,
    )
    message.soak.FromTimedelta(phase.soak)
    message.silence_limit.FromTimedelta(phase.silence_limit)
    return message


def to_json(phase: Phase) -> dict[str, Any]:
    """Proto JSON of a phase."""
    return json_format.MessageToDict(message_of(phase))


def from_json(kept: dict[str, Any]) -> Phase:
    """The phase in proto JSON."""
    return phase_of(json_format.ParseDict(kept, pb.Phase(), ignore_unknown_fields=True))


def window_of(message: pb.MaintenanceWindow) -> Window:
    """Reads a window."""
    return Window(
        weekdays=tuple(sorted(set(message.weekdays))),
        start=message.start,
        duration=message.duration.ToTimedelta(),
        time_zone=message.time_zone,
    )


def window_message(window: Window) -> pb.MaintenanceWindow:
    """Writes a window."""
    message = pb.MaintenanceWindow(weekdays=window.weekdays, start=window.start, time_zone=window.time_zone)
    message.duration.FromTimedelta(window.duration)
    return message


def window_to_json(window: Window) -> dict[str, Any]:
    """Proto JSON of a window."""
    return json_format.MessageToDict(window_message(window))


def window_from_json(kept: dict[str, Any]) -> Window:
    """The window in proto JSON."""
    return window_of(json_format.ParseDict(kept, pb.MaintenanceWindow(), ignore_unknown_fields=True))
