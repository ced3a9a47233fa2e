"""Phases as messages and as the JSON that the registry keeps."""

from typing import Any

from google.protobuf import json_format

from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.cloud.rollout.phases import DEFAULT_SILENCE_LIMIT, Phase


def phase_of(message: pb.Phase) -> Phase:
    """Reads a phase; zeros take the defaults that the contract names."""
    return Phase(
        share=message.share,
        success_share=message.success_share or 1.0,
        failure_share=message.failure_share,
        min_answers=message.min_answers or 1,
        soak=message.soak.ToTimedelta(),
        silence_limit=message.silence_limit.ToTimedelta()
        if message.HasField("silence_limit")
        else DEFAULT_SILENCE_LIMIT,
    )


def message_of(phase: Phase) -> pb.Phase:
    """Writes a phase with every default spelled out."""
    message = pb.Phase(
        share=phase.share,
        success_share=phase.success_share,
        failure_share=phase.failure_share,
        min_answers=phase.min_answers,
    )
    message.soak.FromTimedelta(phase.soak)
    message.silence_limit.FromTimedelta(phase.silence_limit)
    return message


def to_json(phase: Phase) -> dict[str, Any]:
    """Proto JSON of a phase."""
    return json_format.MessageToDict(message_of(phase))


def from_json(kept: dict[str, Any]) -> Phase:
    """The phase in proto JSON."""
    return phase_of(json_format.ParseDict(kept, pb.Phase()))
