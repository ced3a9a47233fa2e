"""StudentService: named lines of small models."""

import datetime as dt
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb_feedback
from ebbflow.api.v1 import student_pb2 as pb
from ebbflow.api.v1 import student_pb2_grpc
from ebbflow.cloud.distillation import corpus, private_texts
from ebbflow.cloud.feedback import policies
from ebbflow.cloud.registry.answers import remember
from ebbflow.cloud.registry.locks import exclusive
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import Student
from ebbflow.cloud.rollout import selector
from ebbflow.cloud.services import specs
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import students
from ebbflow.cloud.services.convert.common import to_json
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import complete_policy, with_lifetime
from ebbflow.common.student.config import StudentConfig

Context = grpc.aio.ServicerContext[Any, Any]

MAX_TOPICS = 256
LEAST_VOCABULARY = 257
"""Every byte and one special token."""
DEFAULT_CONTEXT = 2048
DEFAULT_ROPE_THETA = 500_000.0
_SHA256_BYTES = 32


class StudentService(student_pb2_grpc.StudentServiceServicer):
    """See student.proto."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def CreateStudent(self, request: pb.CreateStudentRequest, context: Context) -> pb.CreateStudentResponse:
        """Starts a line, after a look at everything that its first distillation would stumble over."""
        cloud, call, wanted = self._cloud, current(), request.student
        student_id = names.check_id(request.student_id, "student_id")
        call.resource = names.make("students", student_id)
        if not wanted.teacher:
            raise EbbflowError(Reason.INVALID_REQUEST, "student.teacher must be said", field="student.teacher")
        shape = complete_architecture(wanted.architecture)
        selector.parse(wanted.selector)
        rollout_policy = specs.check_policy(wanted.rollout_policy)
        topics, policy = await cloud.in_thread(
            cloud.files, lambda: (self._topics(wanted.corpus_sha256), complete_policy(wanted.privacy_policy))
        )

        def create(session: Session, now: dt.datetime) -> pb.CreateStudentResponse:
            exclusive(session, call.resource)
            if session.get(Student, student_id) is not None:
                raise EbbflowError(Reason.ALREADY_EXISTS, f"{call.resource} exists already", name=call.resource)
            private_texts.reserve_corpus(session, cloud.blobs, wanted.corpus_sha256.hex())
            row = Student(
                id=student_id,
                teacher=wanted.teacher,
                architecture=to_json(shape),
                corpus_sha256=wanted.corpus_sha256.hex(),
                topics=topics,
                privacy_policy=to_json(policy),
                selector=wanted.selector,
                create_time=now,
                rollout_policy=to_json(rollout_policy),
            )
            session.add(row)
            session.flush()
            policies.current(session, row, cloud.plan_signer, now)
            return pb.CreateStudentResponse(student=students.student(row))

        return await cloud.change(
            lambda session, now: remember(
                session,
                call.actor,
                request.request_id,
                request,
                now,
                lambda: create(session, now),
                pb.CreateStudentResponse,
            )
        )

    async def GetStudent(self, request: pb.GetStudentRequest, context: Context) -> pb.GetStudentResponse:
        """Returns one."""
        row = await self._cloud.read(lambda session: find(session, names.parse(request.name, "students")))
        return pb.GetStudentResponse(student=students.student(row))

    async def ListStudents(self, request: pb.ListStudentsRequest, context: Context) -> pb.ListStudentsResponse:
        """Returns a page, by name."""
        rows, token = await self._cloud.read(
            lambda session: page(session, sa.select(Student), [Student.id], request.page_size, request.page_token)
        )
        return pb.ListStudentsResponse(students=map(students.student, rows), next_page_token=token)

    async def UpdateRolloutPolicy(
        self, request: pb.UpdateRolloutPolicyRequest, context: Context
    ) -> pb.UpdateRolloutPolicyResponse:
        """Replaces what every later rollout keeps to; those that have begun keep to what they began with."""
        student_id = names.parse(request.name, "students")
        policy = specs.check_policy(request.rollout_policy)

        def work(session: Session, _: dt.datetime) -> pb.UpdateRolloutPolicyResponse:
            row = find(session, student_id)
            row.rollout_policy = to_json(policy)
            session.flush()
            return pb.UpdateRolloutPolicyResponse(student=students.student(row))

        return await self._cloud.change(work)

    async def UpdatePrivacyPolicy(
        self, request: pb.UpdatePrivacyPolicyRequest, context: Context
    ) -> pb.UpdatePrivacyPolicyResponse:
        """Signs a new version; rounds that are open keep to theirs."""
        cloud, student_id = self._cloud, names.parse(request.name, "students")
        wanted = pb_feedback.PrivacyPolicy()
        wanted.CopyFrom(request.privacy_policy)
        policy = await cloud.in_thread(cloud.files, lambda: with_lifetime(wanted, request.lifetime_epsilon))

        def work(session: Session, now: dt.datetime) -> pb.UpdatePrivacyPolicyResponse:
            policies.lock(session, student_id)
            row = find(session, student_id)
            policies.current(session, row, cloud.plan_signer, now)  # what held before stays on record
            version = policies.append(session, row, policy, request.note, cloud.plan_signer, now)
            return pb.UpdatePrivacyPolicyResponse(
                student=students.student(row), document=pb_feedback.PolicyDocument.FromString(version.document)
            )

        return await cloud.change(work)

    async def ListPrivacyPolicies(
        self, request: pb.ListPrivacyPoliciesRequest, context: Context
    ) -> pb.ListPrivacyPoliciesResponse:
        """Returns every version, newest first."""
        student_id = names.parse(request.name, "students")

        def work(session: Session) -> pb.ListPrivacyPoliciesResponse:
            find(session, student_id)
            versions = policies.every(session, student_id)
            documents = [pb_feedback.PolicyDocument.FromString(version.document) for version in versions]
            return pb.ListPrivacyPoliciesResponse(documents=documents)

        return await self._cloud.read(work)

    async def UpdateEscalationPolicy(
        self, request: pb.UpdateEscalationPolicyRequest, context: Context
    ) -> pb.UpdateEscalationPolicyResponse:
        """Replaces whether agents may ask the teacher; holds from the next question on."""
        student_id = names.parse(request.name, "students")

        def work(session: Session, _: dt.datetime) -> pb.UpdateEscalationPolicyResponse:
            row = find(session, student_id)
            row.escalation_policy = to_json(request.escalation_policy)
            session.flush()
            return pb.UpdateEscalationPolicyResponse(student=students.student(row))

        return await self._cloud.change(work)

    def _topics(self, sha256: bytes) -> list[str]:
        if len(sha256) != _SHA256_BYTES:
            message = f"student.corpus_sha256 must have {_SHA256_BYTES} bytes"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="student.corpus_sha256")
        topics: dict[str, None] = {}
        trainable = False
        for text in corpus.stream(self._cloud.blobs, sha256.hex()):
            topics[text.topic] = None
            trainable = trainable or text.split == "train"
            if len(topics) > MAX_TOPICS:
                message = f"the corpus has more than the {MAX_TOPICS} topics that can be voted over"
                raise EbbflowError(Reason.CORPUS_INVALID, message, most=MAX_TOPICS)
        if not trainable:
            raise EbbflowError(Reason.CORPUS_INVALID, "the corpus has no text of the split 'train'")
        return list(topics)


def find(session: Session, student_id: str) -> Student:
    """Returns a student.

    Raises:
        EbbflowError: STUDENT_NOT_FOUND.
    """
    row = session.get(Student, student_id)
    if row is None:
        name = names.make("students", student_id)
        raise EbbflowError(Reason.STUDENT_NOT_FOUND, f"there is no {name}", student=name)
    return row


def complete_architecture(wanted: pb.Architecture) -> pb.Architecture:
    """Returns the shape with every default filled in. A checkpoint to begin from brings its own.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field, for a shape that no decoder can have.
    """
    shape = pb.Architecture()
    shape.CopyFrom(wanted)
    if shape.initial_checkpoint:
        return shape
    shape.intermediate_size = shape.intermediate_size or 3 * shape.hidden_size
    shape.num_key_value_heads = shape.num_key_value_heads or shape.num_attention_heads
    shape.head_dim = shape.head_dim or shape.hidden_size // max(1, shape.num_attention_heads)
    shape.max_position_embeddings = shape.max_position_embeddings or DEFAULT_CONTEXT
    shape.rope_theta = shape.rope_theta or DEFAULT_ROPE_THETA
    if shape.vocabulary_size and shape.vocabulary_size < LEAST_VOCABULARY:
        message = f"vocabulary_size must be 0 or at least {LEAST_VOCABULARY}, not {shape.vocabulary_size}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="vocabulary_size")
    StudentConfig(
        vocab_size=shape.vocabulary_size or LEAST_VOCABULARY,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rope_theta=shape.rope_theta,
    )
    return shape
