"""Students."""

from ebbflow.api.v1 import feedback_pb2, student_pb2
from ebbflow.cloud.registry.tables import Student
from ebbflow.cloud.services.convert.common import from_json, timestamp
from ebbflow.common import names


def student(row: Student) -> student_pb2.Student:
    """A student."""
    return student_pb2.Student(
        name=names.make("students", row.id),
        teacher=row.teacher,
        architecture=from_json(row.architecture, student_pb2.Architecture),
        corpus_sha256=bytes.fromhex(row.corpus_sha256),
        privacy_policy=from_json(row.privacy_policy, feedback_pb2.PrivacyPolicy),
        selector=row.selector,
        create_time=timestamp(row.create_time),
        topics=row.topics,
        rollout_policy=from_json(row.rollout_policy, student_pb2.RolloutPolicy),
        escalation_policy=from_json(row.escalation_policy, student_pb2.EscalationPolicy),
    )
