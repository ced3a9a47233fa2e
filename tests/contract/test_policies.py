"""Every version of a student's privacy policy is signed, kept and shown, on every database."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from feedback_world import AGENTS, DAY, NOW, SIGNER, add_fleet, open_round
from securesystemslib.signer import Signature

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import student_pb2
from ebbflow.api.v1.student_pb2_grpc import StudentServiceStub
from ebbflow.cloud.feedback import policies, round_rows, rounds
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import PolicyVersion, Student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.accounting import epsilon_of

Plane = Any


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    add_fleet(registry)
    return registry


def change(registry: Registry, note: str = "", **policy: Any) -> PolicyVersion:
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        policies.current(session, student, PlanSigner(SIGNER), NOW)
        wanted = pb.PrivacyPolicy(**policy)
        return policies.append(session, student, wanted, note, PlanSigner(SIGNER), NOW)


def versions(registry: Registry) -> list[int]:
    with registry.reading() as session:
        return [row.version for row in policies.every(session, "faq")]


def test_an_older_student_gets_its_first_version_when_it_is_needed(fleet: Registry) -> None:
    assert versions(fleet) == []
    plan = round_rows.plan_of(open_round(fleet))
    assert versions(fleet) == [1]
    document = pb.PolicyDocument.FromString(plan.signed_policy.document)
    assert (document.student, document.version, document.policy) == ("students/faq", 1, plan.policy)
    signature = Signature(plan.signed_policy.key_id, plan.signed_policy.signature.hex())
    SIGNER.public_key.verify_signature(signature, plan.signed_policy.document)


def test_a_new_version_holds_from_the_next_round_on(fleet: Registry) -> None:
    before = round_rows.plan_of(open_round(fleet))
    change(fleet, epsilon=3.0, retention_days=30, allow_adapters=True)
    after = round_rows.plan_of(open_round(fleet))
    assert (before.policy.epsilon, after.policy.epsilon) == (4.0, 3.0)
    assert (after.policy.retention_days, after.policy.allow_adapters) == (30, True)
    with fleet.reading() as session:
        for signed in rounds.signed_plans(session, rounds.waiting_for(session, AGENTS[0], NOW)):
            plan = pb.RoundPlan.FromString(signed.plan)
            assert plan in (before, after)
        assert session.get_one(Student, "faq").privacy_policy["epsilon"] == 3.0


def test_versions_go_up_by_one_and_none_is_lost_when_many_sign_at_once(fleet: Registry) -> None:
    with ThreadPoolExecutor(4) as pool:

        def sign(number: int) -> None:
            with fleet.transaction() as session:
                policies.lock(session, "faq")
                student = session.get_one(Student, "faq")
                policies.append(session, student, pb.PrivacyPolicy(), f"{number}", PlanSigner(SIGNER), NOW)

        list(pool.map(sign, range(8)))
    assert versions(fleet) == [8, 7, 6, 5, 4, 3, 2, 1]
    with fleet.reading() as session:
        notes = {pb.PolicyDocument.FromString(row.document).note for row in policies.every(session, "faq")}
    assert notes == {str(number) for number in range(8)}


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"delta": 0.5}, "delta"),
        ({"rounds_per_window": 5000}, "rounds_per_window"),
        ({"window_days": 4000}, "window_days"),
        ({"retention_days": 40_000}, "retention_days"),
    ],
)
def test_a_policy_that_no_round_could_obey_is_not_signed(fleet: Registry, policy: dict[str, Any], field: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        change(fleet, **policy)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_REQUEST, f"privacy_policy.{field}")
    assert versions(fleet) == []


def test_a_shorter_window_does_not_renew_what_was_spent(fleet: Registry) -> None:
    for _ in range(4):
        open_round(fleet)
    change(fleet, window_days=7)
    with pytest.raises(EbbflowError) as caught:
        open_round(fleet)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert round_rows.plan_of(open_round(fleet, NOW + 8 * DAY)).policy.window_days == 7


def test_rounds_of_two_versions_share_a_window_only_as_far_as_is_proved(fleet: Registry) -> None:
    """One of two rounds and two of four leave just enough rho, but noise on a lattice costs more than its rho says."""
    change(fleet, rounds_per_window=2)
    first = round_rows.plan_of(open_round(fleet))
    change(fleet, rounds_per_window=4)
    second = round_rows.plan_of(open_round(fleet))
    assert first.mechanism.rho_nano + 2 * second.mechanism.rho_nano <= second.policy.rho_cap_nano
    with pytest.raises(EbbflowError, match="leave too little"):
        open_round(fleet)


def test_rounds_under_a_weaker_policy_count_against_a_stricter_one(fleet: Registry) -> None:
    open_round(fleet)
    change(fleet, epsilon=2.0)
    with pytest.raises(EbbflowError, match="leave too little"):
        open_round(fleet)


def test_a_richer_policy_does_not_reopen_a_spent_window(fleet: Registry) -> None:
    for _ in range(4):
        open_round(fleet)
    change(fleet, epsilon=4.0, rounds_per_window=8)
    with pytest.raises(EbbflowError) as caught:
        open_round(fleet)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED


def test_what_the_owner_signed_is_the_very_policy_of_plans_whatever_the_row_says(fleet: Registry) -> None:
    open_round(fleet)
    with fleet.transaction() as session:
        session.get_one(Student, "faq").privacy_policy = {"epsilon": 9.0}
    assert round_rows.plan_of(open_round(fleet)).policy.epsilon == 4.0


# Over gRPC


def students(plane: Plane, role: str = "owner") -> Any:
    return StudentServiceStub(plane.admin(role).channel)


async def created(plane: Plane) -> Any:
    plane.student("other")
    stub = students(plane)
    with plane.registry.reading() as session:
        corpus = bytes.fromhex(session.get_one(Student, "other").corpus_sha256)
    student = student_pb2.Student(
        teacher="/models/teacher",
        architecture=student_pb2.Architecture(hidden_size=8, num_hidden_layers=1, num_attention_heads=2),
        corpus_sha256=corpus,
    )
    await stub.CreateStudent(
        student_pb2.CreateStudentRequest(student_id="faq", student=student, request_id=str(uuid.uuid4()))
    )
    return stub


async def test_a_student_begins_with_a_signed_version(plane: Plane) -> None:
    stub = await created(plane)
    answer = await stub.ListPrivacyPolicies(student_pb2.ListPrivacyPoliciesRequest(name="students/faq"))
    [document] = answer.documents
    assert (document.version, document.policy.epsilon, document.policy.retention_days) == (1, 4.0, 90)
    with plane.registry.reading() as session:
        [row] = policies.every(session, "faq")
    key = plane.cloud.plan_signer._signer.public_key
    key.verify_signature(Signature(row.key_id, row.signature.hex()), row.document)


async def test_owners_change_policies_and_everybody_can_read_why(plane: Plane) -> None:
    stub = await created(plane)
    request = student_pb2.UpdatePrivacyPolicyRequest(
        name="students/faq", privacy_policy=pb.PrivacyPolicy(epsilon=2.0), note="stricter", lifetime_epsilon=6.0
    )
    answer = await stub.UpdatePrivacyPolicy(request)
    assert (answer.document.version, answer.document.note) == (2, "stricter")
    assert answer.student.privacy_policy == answer.document.policy
    assert epsilon_of(answer.document.policy.lifetime_rho_cap_nano, 1e-6) == pytest.approx(6.0, abs=1e-6)
    viewer = students(plane, "viewer")
    listed = await viewer.ListPrivacyPolicies(student_pb2.ListPrivacyPoliciesRequest(name="students/faq"))
    assert [document.version for document in listed.documents] == [2, 1]


@pytest.mark.parametrize("role", ["operator", "viewer"])
async def test_only_owners_change_policies(plane: Plane, role: str) -> None:
    await created(plane)
    with pytest.raises(EbbflowError) as caught:
        await students(plane, role).UpdatePrivacyPolicy(
            student_pb2.UpdatePrivacyPolicyRequest(name="students/faq", privacy_policy=pb.PrivacyPolicy(epsilon=9.0))
        )
    assert caught.value.reason is Reason.ROLE_INSUFFICIENT
    assert versions(plane.registry) == [1]


@pytest.mark.parametrize(
    "wanted",
    [
        {"lifetime_epsilon": 1.0},
        {"note": "x" * 1001},
        {"privacy_policy": pb.PrivacyPolicy(window_days=1000)},
    ],
)
async def test_a_senseless_change_is_refused(plane: Plane, wanted: dict[str, Any]) -> None:
    stub = await created(plane)
    with pytest.raises(EbbflowError) as caught:
        await stub.UpdatePrivacyPolicy(student_pb2.UpdatePrivacyPolicyRequest(name="students/faq", **wanted))
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert versions(plane.registry) == [1]


async def test_policies_of_nobody_are_not_found(plane: Plane) -> None:
    with pytest.raises(EbbflowError) as caught:
        await students(plane).ListPrivacyPolicies(student_pb2.ListPrivacyPoliciesRequest(name="students/none"))
    assert caught.value.reason is Reason.STUDENT_NOT_FOUND
