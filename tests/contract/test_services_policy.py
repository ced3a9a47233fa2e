"""What every rollout of a student keeps to, over real connections."""

from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.duration_pb2 import Duration
from rollout_world import EVERYBODY, Fleet, Plane, refused

from ebbflow.api.v1 import rollout_pb2, student_pb2
from ebbflow.api.v1.student_pb2_grpc import StudentServiceStub
from ebbflow.cloud.registry.tables import AuditEntry, Student
from ebbflow.common.errors import Reason

SHAPE = student_pb2.Architecture(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, vocabulary_size=512
)
POLICY = student_pb2.RolloutPolicy(
    approval_required=True,
    phases=[rollout_pb2.Phase(count=3, soak=Duration(seconds=60)), EVERYBODY],
    windows=[rollout_pb2.MaintenanceWindow(start="22:00", duration=Duration(seconds=3600))],
    spread=Duration(seconds=600),
    on_halt=rollout_pb2.ON_HALT_ROLL_BACK,
    kept_releases=4,
)


def update(**fields: Any) -> student_pb2.UpdateRolloutPolicyRequest:
    policy = student_pb2.RolloutPolicy(**fields)
    return student_pb2.UpdateRolloutPolicyRequest(name="students/faq", rollout_policy=policy)


async def test_a_student_is_created_and_shown_with_its_policy(plane: Plane) -> None:
    plane.student("other")
    with plane.registry.reading() as session:
        corpus_sha256 = bytes.fromhex(session.get_one(Student, "other").corpus_sha256)
    stub = StudentServiceStub(plane.admin("operator").channel)
    student = student_pb2.Student(
        teacher="/models/teacher", architecture=SHAPE, corpus_sha256=corpus_sha256, rollout_policy=POLICY
    )
    request = student_pb2.CreateStudentRequest(student_id="faq", student=student)
    made = (await stub.CreateStudent(request)).student
    assert made.rollout_policy == POLICY
    assert (await stub.GetStudent(student_pb2.GetStudentRequest(name="students/faq"))).student == made
    listed = (await stub.ListStudents(student_pb2.ListStudentsRequest())).students
    assert [each.rollout_policy for each in listed] == [POLICY, student_pb2.RolloutPolicy()]
    request.student_id = "another"
    request.student.rollout_policy.kept_releases = 1001
    error = await refused(stub.CreateStudent(request))
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_REQUEST, "kept_releases")


async def test_only_an_owner_allows_agents_to_escalate_and_no_student_begins_with_it(plane: Plane) -> None:
    plane.student("other")
    with plane.registry.reading() as session:
        corpus_sha256 = bytes.fromhex(session.get_one(Student, "other").corpus_sha256)
    operator = StudentServiceStub(plane.admin("operator").channel)
    allowed = student_pb2.EscalationPolicy(allowed=True)
    student = student_pb2.Student(
        teacher="/models/teacher", architecture=SHAPE, corpus_sha256=corpus_sha256, escalation_policy=allowed
    )
    made = await operator.CreateStudent(student_pb2.CreateStudentRequest(student_id="faq", student=student))
    assert not made.student.escalation_policy.allowed
    request = student_pb2.UpdateEscalationPolicyRequest(name="students/faq", escalation_policy=allowed)
    assert (await refused(operator.UpdateEscalationPolicy(request))).reason is Reason.ROLE_INSUFFICIENT
    owner = StudentServiceStub(plane.admin("owner").channel)
    for policy in (allowed, student_pb2.EscalationPolicy()):
        request.escalation_policy.CopyFrom(policy)
        assert (await owner.UpdateEscalationPolicy(request)).student.escalation_policy == policy
        shown = await operator.GetStudent(student_pb2.GetStudentRequest(name="students/faq"))
        assert shown.student.escalation_policy == policy
        assert shown.student.rollout_policy == made.student.rollout_policy
    with plane.registry.reading() as session:
        audited = session.scalars(sa.select(AuditEntry).where(AuditEntry.method.endswith("UpdateEscalationPolicy")))
        assert [(entry.resource, entry.code) for entry in audited] == [
            ("students/faq", "PERMISSION_DENIED"),
            ("students/faq", "OK"),
            ("students/faq", "OK"),
        ]


async def test_an_owner_replaces_the_policy_and_later_rollouts_keep_to_it(plane: Plane) -> None:
    fleet = Fleet(plane)
    before = await fleet.create()
    owner = StudentServiceStub(plane.admin("owner").channel)
    operator = StudentServiceStub(fleet.ada.channel)
    request = student_pb2.UpdateRolloutPolicyRequest(name="students/faq", rollout_policy=POLICY)
    assert (await refused(operator.UpdateRolloutPolicy(request))).reason is Reason.ROLE_INSUFFICIENT
    for _ in range(2):
        assert (await owner.UpdateRolloutPolicy(request)).student.rollout_policy == POLICY
    assert await fleet.get(before.name) == before
    after = await fleet.create()
    assert (after.state, after.spread.seconds) == (rollout_pb2.Rollout.STATE_WAITING_FOR_APPROVAL, 600)
    assert (await owner.UpdateRolloutPolicy(update())).student.rollout_policy == student_pb2.RolloutPolicy()
    unknown = student_pb2.UpdateRolloutPolicyRequest(name="students/nobody")
    assert (await refused(owner.UpdateRolloutPolicy(unknown))).reason is Reason.STUDENT_NOT_FOUND


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (update(phases=[rollout_pb2.Phase(), EVERYBODY]), "phases[0].share"),
        (update(phases=[rollout_pb2.Phase(failure_share=1.0)]), "phases[0].failure_share"),
        (update(windows=[rollout_pb2.MaintenanceWindow(start="22:00")]), "windows[0].duration"),
        (update(spread=Duration(seconds=-5)), "spread"),
        (update(on_halt=9), "on_halt"),
        (update(kept_releases=1001), "kept_releases"),
    ],
)
async def test_a_policy_that_no_rollout_could_keep_to_is_refused(
    plane: Plane, request_: student_pb2.UpdateRolloutPolicyRequest, field: str
) -> None:
    plane.student()
    owner = StudentServiceStub(plane.admin("owner").channel)
    error = await refused(owner.UpdateRolloutPolicy(request_))
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_REQUEST, field)
