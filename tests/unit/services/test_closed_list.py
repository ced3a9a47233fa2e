"""The closed list of what leaves a device outside the feedback channel: nothing here derives from a user's request.

A new field is a decision and not an oversight: say here where its value comes from.
"""

from ebbflow.api.v1 import agent_pb2, resources_pb2, teacher_pb2

TELEMETRY = {
    "uptime_s": "the process",
    "memory_used_percent": "the device, rounded to tens",
    "disk_free_mib": "the device, rounded down to a power of two",
    "temperature_c": "the device, rounded to fives",
    "power_source": "the device",
    "installations": "see INSTALLATION",
}
INSTALLATION = {
    "student": "the cloud",
    "release": "the cloud",
    "precision": "the cloud, from the device's profile",
    "state": "the installation",
    "reason": "the installation: one word",
    "probe_loss": "prompts that are signed with the release",
    "fetched_bytes": "the network, for this release alone",
    "update_time": "the device's clock",
    "resume_time": "the agent's own settings: when its transfer window opens next",
}
PROFILE = {
    "architecture": "the device",
    "memory_mib": "the agent's settings",
    "cores": "the agent's settings",
    "precisions": "the agent's software and settings",
    "agent_version": "the agent's software",
}

ESCALATED = {
    "student": "the cloud",
    "prompt": "the user, who has agreed to it for this request",
    "max_tokens": "the request",
    "temperature": "the request",
    "seed": "the request, or chance",
    "stop": "the request",
}


def fields(message: type) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.fields}  # type: ignore[attr-defined]


def test_the_lists_are_closed() -> None:
    assert fields(agent_pb2.Telemetry) == set(TELEMETRY)
    assert fields(resources_pb2.Installation) == set(INSTALLATION)
    assert fields(resources_pb2.DeviceProfile) == set(PROFILE)


def test_the_control_line_carries_nothing_else() -> None:
    assert fields(agent_pb2.ConnectRequest) == {"hello", "heartbeat"}
    assert fields(agent_pb2.Hello) == {"instance_id", "profile"}
    assert fields(agent_pb2.Heartbeat) == {"telemetry"}
    assert fields(agent_pb2.ReportInstallationRequest) == {"installation"}
    assert fields(agent_pb2.GetDesiredStateRequest) == {"profile"}


def test_an_escalated_question_says_nothing_of_who_asks() -> None:
    assert fields(teacher_pb2.EscalateRequest) == set(ESCALATED)
    assert fields(teacher_pb2.GetEscalationRequest) == {"student"}
