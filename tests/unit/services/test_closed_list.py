"""The closed list of what leaves a device: outside the feedback channel nothing derives from a user's request.

The test walks every message that an agent may send, over all services. A new field is a decision and not an oversight:
say here where its value comes from.
"""

import ast
from pathlib import Path

from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pool import Default

from ebbflow.api.v1 import agent_pb2, artefact_pb2, enrolment_pb2, feedback_pb2, teacher_pb2
from ebbflow.cloud.services.policy import PACKAGE, POLICY
from ebbflow.cloud.teacher.admission import AGENTS_MAY

EDGE = Path(__file__).parents[3] / "edge" / "ebbflow" / "edge"
LOADED = (agent_pb2, artefact_pb2, enrolment_pb2, feedback_pb2, teacher_pb2)
"""Imported so that the pool of descriptors knows their services."""

SOURCES = {
    "EnrolRequest": {
        "token": "the operator",
        "csr_der": "a key that is made for it",
        "agent_id": "the operator",
        "profile": "see DeviceProfile",
        "labels": "the operator",
        "request_id": "chance",
        "new_device": "the operator",
    },
    "EnrolRequest.LabelsEntry": {"key": "the operator", "value": "the operator"},
    "RecoverRequest": {
        "certificate_pem": "the cloud",
        "csr_der": "the device's key",
        "proof": "the device's key, over csr_der",
    },
    "RenewRequest": {"csr_der": "the device's key"},
    "ConnectRequest": {"hello": "see Hello", "heartbeat": "see Heartbeat"},
    "Hello": {"instance_id": "chance", "profile": "see DeviceProfile"},
    "Heartbeat": {"telemetry": "see Telemetry"},
    "Telemetry": {
        "uptime_s": "the process",
        "memory_used_percent": "the device, rounded to tens",
        "disk_free_mib": "the device, rounded down to a power of two",
        "temperature_c": "the device, rounded to fives",
        "power_source": "the device",
        "installations": "see Installation",
    },
    "Installation": {
        "student": "the cloud",
        "release": "the cloud",
        "precision": "the cloud, from the device's profile",
        "state": "the installation",
        "reason": "the installation: one word",
        "probe_loss": "prompts that are signed with the release",
        "fetched_bytes": "the network, for this release alone",
        "update_time": "the device's clock",
        "resume_time": "the agent's own settings: when its transfer window opens next",
    },
    "DeviceProfile": {
        "architecture": "the device",
        "memory_mib": "the agent's settings",
        "cores": "the agent's settings",
        "precisions": "the agent's software and settings",
        "agent_version": "the agent's software",
    },
    "GetDesiredStateRequest": {"profile": "see DeviceProfile"},
    "ReportInstallationRequest": {"installation": "see Installation"},
    "ReadMetadataRequest": {"file_name": "signed metadata"},
    "ReadBlobRequest": {
        "sha256": "signed metadata",
        "offset_bytes": "how much of the file is there",
        "max_chunk_bytes": "the agent's settings",
    },
    "FindDeltasRequest": {"base_sha256": "signed metadata", "target_sha256": "signed metadata"},
    "GetPlanRequest": {"held_rounds": "the cloud's earlier answers, whatever became of them"},
    "GetEscalationRequest": {"student": "the cloud"},
}
"""Every message that may leave a device, but for the two channels below, and where each value comes from."""

PRIVATE = {
    "SubmitBatchRequest": {"batch": "see SignedBatch"},
    "SignedBatch": {"batch": "a serialised FeedbackBatch", "signature": "the device's key, over batch"},
    "FeedbackBatch": {
        "batch_id": "chance",
        "round": "the plan",
        "plan_sha256": "the plan",
        "mechanism": "the plan",
        "noisy": "users, with noise on every value",
        "sampler": "the agent's software",
        "base_release": "the release that the device serves",
    },
    "Mechanism": {
        "kind": "the plan",
        "sigma_squared_numerator": "the plan",
        "sigma_squared_denominator": "the plan",
        "sensitivity_squared": "the plan",
        "rho_nano": "the plan",
    },
}
"""The feedback channel: the one value that derives from users is `noisy`."""

ESCALATED = {
    "EscalateRequest": {
        "student": "the cloud",
        "prompt": "the user, who has agreed to it for this request",
        "max_tokens": "the request",
        "temperature": "the request",
        "seed": "the request, or chance",
        "stop": "the request",
    }
}
"""Questions that owner, operator and user have agreed to show the teacher. Nothing in them says who asks."""

SERVICES = {f"{name}Service" for name in ("Agent", "Artefact", "Enrolment", "Feedback", "Inference", "Teacher")}
"""The services whose stubs the agent's software has; InferenceService is its own."""


def walk(message: Descriptor, found: dict[str, set[str]]) -> None:
    """Adds a message and all that it may hold."""
    if not message.full_name.startswith(f"{PACKAGE}."):
        return  # a Timestamp and its like: what they hold is said where they are used
    name = message.full_name.removeprefix(f"{PACKAGE}.")
    if name not in found:
        found[name] = {field.name for field in message.fields}
        for field in message.fields:
            if field.message_type:
                walk(field.message_type, found)


def requests_of(paths: set[str]) -> dict[str, set[str]]:
    """Fields of every message that calls of these methods may carry, by the message's name."""
    found: dict[str, set[str]] = {}
    for path in paths:
        service, method = path.removeprefix("/").split("/")
        walk(Default().FindServiceByName(service).methods_by_name[method].input_type, found)
    return found


def fields(sources: dict[str, dict[str, str]]) -> dict[str, set[str]]:
    return {message: set(by_field) for message, by_field in sources.items()}


OPEN_TO_AGENTS = {path for path, rule in POLICY.items() if rule.agents or rule.anyone}
SUBMIT = f"/{PACKAGE}.FeedbackService/SubmitBatch"
ESCALATE = f"/{PACKAGE}.TeacherService/Escalate"
TEACHER = {f"/{PACKAGE}.TeacherService/{method}" for method in AGENTS_MAY}


def test_every_message_that_an_agent_may_send_is_on_the_list() -> None:
    assert requests_of((OPEN_TO_AGENTS | TEACHER) - {SUBMIT, ESCALATE}) == fields(SOURCES)


def test_the_feedback_channel_carries_nothing_but_noisy_values_and_the_plans_own_words() -> None:
    found = requests_of({SUBMIT})
    walk(feedback_pb2.FeedbackBatch.DESCRIPTOR, found)
    assert found == fields(PRIVATE)


def test_an_escalated_question_says_nothing_of_who_asks() -> None:
    assert requests_of({ESCALATE}) == fields(ESCALATED)


def test_no_source_but_noisy_and_an_escalated_prompt_is_a_user() -> None:
    everything = SOURCES | PRIVATE | ESCALATED
    users = {
        f"{message}.{field}"
        for message, by_field in everything.items()
        for field, source in by_field.items()
        if "user" in source
    }
    assert users == {"FeedbackBatch.noisy", "EscalateRequest.prompt"}


def test_the_agents_software_can_call_no_other_service() -> None:
    """Whatever the cloud would allow: the stubs of other services are nowhere in it."""
    found = set()
    for file in EDGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name.endswith(("ServiceStub", "ServiceAsyncStub")):
                found.add(name.removesuffix("Stub").removesuffix("Async"))
    assert found <= SERVICES
    assert found >= SERVICES - {"InferenceService"}
