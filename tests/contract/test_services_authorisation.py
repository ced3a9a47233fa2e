"""Who may call what, over real connections: every method, every role."""

from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf import empty_pb2
from google.protobuf.descriptor import MethodDescriptor

from ebbflow.api.v1 import (
    agent_pb2,
    artefact_pb2,
    distillation_pb2,
    enrolment_pb2,
    feedback_pb2,
    fleet_pb2,
    ledger_pb2,
    population_pb2,
    release_pb2,
    resources_pb2,
    rollout_pb2,
    round_pb2,
    student_pb2,
    trust_pb2,
)
from ebbflow.api.v1.agent_pb2_grpc import AgentServiceStub
from ebbflow.api.v1.artefact_pb2_grpc import ArtefactServiceStub
from ebbflow.api.v1.fleet_pb2_grpc import FleetServiceStub
from ebbflow.api.v1.student_pb2_grpc import StudentServiceStub
from ebbflow.client.channels import channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.registry.tables import AuditEntry, Student
from ebbflow.cloud.services import listeners, policy
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr

Plane = Any
FILES = (
    agent_pb2,
    artefact_pb2,
    distillation_pb2,
    enrolment_pb2,
    feedback_pb2,
    fleet_pb2,
    ledger_pb2,
    release_pb2,
    resources_pb2,
    rollout_pb2,
    population_pb2,
    round_pb2,
    student_pb2,
    trust_pb2,
)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
SHAPE = student_pb2.Architecture(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocabulary_size=512,
    max_position_embeddings=128,
)
MAIN = [path for path in METHODS if "EnrolmentService" not in path]


def test_every_method_has_a_rule_and_no_rule_lacks_a_method() -> None:
    assert set(policy.POLICY) == set(METHODS)


def test_every_service_is_served_by_exactly_one_listener() -> None:
    served = [f"{policy.PACKAGE}.{name}" for name in (*listeners.MAIN_SERVICES, *listeners.ENROLMENT_SERVICES)]
    assert sorted(served) == sorted({path.split("/")[1] for path in METHODS})


def test_a_method_that_is_not_listed_is_refused_to_everybody() -> None:
    assert policy.rule_of("/ebbflow.api.v1.FleetService/EraseFleet") is None


def test_only_reading_methods_are_open_to_viewers() -> None:
    assert [path for path, rule in policy.POLICY.items() if rule.admins == "viewer" and rule.mutates] == []


async def outcome(plane_channel: Any, path: str) -> Reason | None:
    """What comes of calling a method with an empty request."""
    method = METHODS[path]
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call = getattr(plane_channel, kind)(path, lambda message: message.SerializeToString(), bytes)
    request = empty_pb2.Empty()
    answer = call(iter([request]) if method.client_streaming else request)
    try:
        if method.server_streaming:
            async for _ in answer:
                answer.cancel()
                return None
        else:
            await answer
    except EbbflowError as error:
        return error.reason
    return None


async def test_every_role_may_do_exactly_what_the_policy_says(plane: Plane) -> None:
    callers = {role: plane.admin(role) for role in ("viewer", "operator", "owner")}
    callers["agent"] = plane.agent("kiosk-7")
    wrong = []
    for role, client in callers.items():
        identity = plane.identity_of(client)
        for path in MAIN:
            reason = await outcome(client.channel, path)
            refused = reason is Reason.ROLE_INSUFFICIENT
            if refused == policy.POLICY[path].allows(identity) or reason is Reason.INTERNAL:
                wrong.append((role, path, reason))
    assert wrong == []


async def test_every_mutating_call_is_audited_even_when_it_is_refused(plane: Plane) -> None:
    viewer, owner = plane.admin("viewer"), plane.admin("owner")
    mutating = [path for path in MAIN if policy.POLICY[path].mutates]
    for path in mutating:
        await outcome(viewer.channel, path)
        await outcome(owner.channel, path)
    with plane.registry.reading() as session:
        entries = session.scalars(sa.select(AuditEntry)).all()
    refused = {
        entry.method for entry in entries if (entry.actor, entry.code) == ("admins/viewer-1", "PERMISSION_DENIED")
    }
    assert refused == {path.rpartition(".")[2] for path in mutating}
    assert {entry.method for entry in entries if entry.actor == "admins/owner-1"} == refused


async def test_reading_is_not_audited(plane: Plane) -> None:
    viewer = plane.admin("viewer")
    await FleetServiceStub(viewer.channel).ListAgents(fleet_pb2.ListAgentsRequest())
    with plane.registry.reading() as session:
        assert session.scalars(sa.select(AuditEntry)).all() == []


async def test_nobody_enters_the_main_listener_without_a_certificate(plane: Plane) -> None:
    bare = channel(Endpoint(plane.bound.main_address, plane.cloud.authority.certificate_pem))
    with pytest.raises(EbbflowError):
        await FleetServiceStub(bare).ListAgents(fleet_pb2.ListAgentsRequest(), timeout=3)
    await bare.close()


async def test_a_certificate_of_another_authority_does_not_enter(plane: Plane, tmp_path: Any) -> None:
    key, stranger = generate_key(), Authority.create(tmp_path / "stranger")
    forged = stranger.issue_admin(make_csr(key), "ada", "owner").certificate_pem
    outside = channel(
        Endpoint(plane.bound.main_address, plane.cloud.authority.certificate_pem, forged, key_to_pem(key))
    )
    with pytest.raises(EbbflowError):
        await FleetServiceStub(outside).ListAgents(fleet_pb2.ListAgentsRequest(), timeout=3)
    await outside.close()


async def test_a_certificate_that_the_registry_does_not_know_is_refused(plane: Plane) -> None:
    key = generate_key()
    unknown = plane.cloud.authority.issue_admin(make_csr(key), "ada", "owner").certificate_pem
    client = plane.connect(unknown, key)
    with pytest.raises(EbbflowError) as caught:
        await FleetServiceStub(client.channel).ListAgents(fleet_pb2.ListAgentsRequest())
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


async def test_the_enrolment_listener_serves_nothing_but_enrolment(plane: Plane) -> None:
    bare = channel(Endpoint(plane.bound.enrolment_address, plane.cloud.authority.certificate_pem))
    with pytest.raises(EbbflowError):
        await FleetServiceStub(bare).ListAgents(fleet_pb2.ListAgentsRequest())
    await bare.close()


async def test_corpora_are_for_those_who_may_upload_them_and_releases_for_viewers_too(plane: Plane) -> None:
    plane.student("faq")
    release = plane.release(1, "faq", b"weights of faq")
    text = plane.cloud.blobs.put([b"an organisation's own words"]).sha256

    async def read(role: str, sha256: str) -> bytes:
        request = artefact_pb2.ReadBlobRequest(sha256=bytes.fromhex(sha256))
        return b"".join([each.chunk async for each in ArtefactServiceStub(plane.admin(role).channel).ReadBlob(request)])

    assert await read("viewer", release) == b"weights of faq"
    assert await read("operator", text) == b"an organisation's own words"
    with pytest.raises(EbbflowError) as caught:
        await read("viewer", text)
    assert caught.value.reason is Reason.BLOB_NOT_FOUND


async def test_an_agent_reads_and_reports_as_itself_only(plane: Plane) -> None:
    plane.student("faq", selector="site=berlin")
    plane.student("other", selector="site=rome")
    sha256 = plane.release(1, "faq", b"weights of faq")
    foreign = plane.release(1, "other", b"weights of other")
    berlin, rome = plane.agent("berlin", labels={"site": "berlin"}), plane.agent("rome", labels={"site": "rome"})
    plane.roll_out("faq", 1)
    plane.roll_out("other", 1)
    for client, student in ((berlin, "faq"), (rome, "other")):
        desired = await AgentServiceStub(client.channel).GetDesiredState(agent_pb2.GetDesiredStateRequest())
        assert [release.student for release in desired.releases] == [f"students/{student}"]
    artefacts = ArtefactServiceStub(berlin.channel)
    own = artefacts.ReadBlob(artefact_pb2.ReadBlobRequest(sha256=bytes.fromhex(sha256)))
    assert b"".join([answer.chunk async for answer in own]) == b"weights of faq"
    with pytest.raises(EbbflowError) as caught:
        async for _ in artefacts.ReadBlob(artefact_pb2.ReadBlobRequest(sha256=bytes.fromhex(foreign))):
            pass
    assert caught.value.reason is Reason.BLOB_NOT_FOUND
    report = agent_pb2.ReportInstallationRequest()
    report.installation.student, report.installation.release = "students/other", "students/other/releases/1"
    report.installation.state = resources_pb2.INSTALLATION_STATE_SERVING
    with pytest.raises(EbbflowError) as caught:
        await AgentServiceStub(berlin.channel).ReportInstallation(report)
    assert caught.value.reason is Reason.STUDENT_NOT_FOUND


async def test_no_unhandled_error_tells_the_client_anything(plane: Plane) -> None:
    plane.student()
    with plane.registry.transaction() as session:
        session.get_one(Student, "faq").architecture = {"hiddenSize": "a secret that no parser takes"}
    with pytest.raises(EbbflowError) as caught:
        await StudentServiceStub(plane.admin().channel).ListStudents(student_pb2.ListStudentsRequest())
    assert (caught.value.reason, str(caught.value), caught.value.metadata) == (Reason.INTERNAL, "internal error", {})


async def test_a_fault_of_the_clouds_own_machine_names_no_path(plane: Plane) -> None:
    operator = plane.admin("operator")
    sha256 = plane.cloud.blobs.put([b"whole"]).sha256
    (plane.cloud.blobs.folder / sha256[:2] / sha256).write_bytes(b"spoilt")
    student = student_pb2.Student(teacher="/models/teacher", corpus_sha256=bytes.fromhex(sha256), architecture=SHAPE)
    with pytest.raises(EbbflowError) as caught:
        await StudentServiceStub(operator.channel).CreateStudent(
            student_pb2.CreateStudentRequest(student_id="faq", student=student)
        )
    assert (caught.value.reason, caught.value.metadata) == (Reason.FILE_CORRUPT, {})
    assert str(plane.cloud.blobs.folder) not in str(caught.value)


async def test_health_and_reflection_answer_on_both_listeners(plane: Plane) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def services(of: grpc.aio.Channel) -> set[str]:
        health = await health_pb2_grpc.HealthStub(of).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        listed = reflection_pb2_grpc.ServerReflectionStub(of).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        async for answer in listed:
            listed.cancel()
            return {service.name for service in answer.list_services_response.service}
        return set()

    bare = channel(Endpoint(plane.bound.enrolment_address, plane.cloud.authority.certificate_pem))
    assert "ebbflow.api.v1.EnrolmentService" in await services(bare)
    assert "ebbflow.api.v1.FleetService" in await services(plane.admin("viewer").channel)
    await bare.close()
