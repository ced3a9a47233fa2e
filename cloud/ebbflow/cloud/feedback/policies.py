"""Versions of a student's privacy policy: each is signed, none is ever changed, agents refuse an older one."""

import datetime as dt

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry import locks
from ebbflow.cloud.registry.tables import PolicyVersion, Student
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import complete_policy
from ebbflow.common.privacy.plans import policy_fault

FIRST_NOTE = "the policy that the student was created with"
MAX_NOTE_CHARACTERS = 1000


def lock(session: Session, student_id: str) -> None:
    """Waits until nobody else opens a round of the student or changes its policy, for the transaction."""
    locks.exclusive(session, f"rounds of students/{student_id}")


def newest(session: Session, student_id: str) -> PolicyVersion | None:
    """Returns the version that holds now, if one was signed yet."""
    query = sa.select(PolicyVersion).where(PolicyVersion.student_id == student_id)
    return session.scalars(query.order_by(PolicyVersion.version.desc()).limit(1)).one_or_none()


def every(session: Session, student_id: str) -> list[PolicyVersion]:
    """Returns all versions, newest first."""
    query = sa.select(PolicyVersion).where(PolicyVersion.student_id == student_id)
    return list(session.scalars(query.order_by(PolicyVersion.version.desc())))


def signed(version: PolicyVersion) -> pb.SignedPolicy:
    """Returns a version as plans carry it."""
    return pb.SignedPolicy(document=version.document, signature=version.signature, key_id=version.key_id)


def policy_of(version: PolicyVersion) -> pb.PrivacyPolicy:
    """Returns what a version allows."""
    return pb.PolicyDocument.FromString(version.document).policy


def current(session: Session, student: Student, signer: PlanSigner, now: dt.datetime) -> PolicyVersion:
    """Returns the version that holds now; signs the first one where there is none.

    Raises:
        EbbflowError: INVALID_REQUEST if the student's policy is out of range.
    """
    found = newest(session, student.id)
    if found is not None:
        return found
    policy = json_format.ParseDict(student.privacy_policy, pb.PrivacyPolicy(), ignore_unknown_fields=True)
    return append(session, student, policy, FIRST_NOTE, signer, now)


def append(
    session: Session, student: Student, policy: pb.PrivacyPolicy, note: str, signer: PlanSigner, now: dt.datetime
) -> PolicyVersion:
    """Signs the next version, which holds from now on. Rounds that are open keep the one that they began with.

    Args:
        session: a writing transaction that holds the student's lock.
        student: whose policy it is.
        policy: the whole policy; zeros take the defaults.
        note: why it changes.
        signer: the feedback key.
        now: when.

    Raises:
        EbbflowError: INVALID_REQUEST if the policy is out of range, or the note too long.
    """
    full = complete_policy(policy)
    if fault := policy_fault(full):
        message = f"{fault[0]} must be {fault[1]}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field=f"privacy_policy.{fault[0]}")
    if len(note) > MAX_NOTE_CHARACTERS:
        message = f"the note has at most {MAX_NOTE_CHARACTERS} characters"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="note")
    before = newest(session, student.id)
    document = pb.PolicyDocument(
        student=names.make("students", student.id),
        version=before.version + 1 if before else 1,
        policy=full,
        note=note,
    )
    document.create_time.FromDatetime(now)
    signature = signer.sign_policy(document)
    row = PolicyVersion(
        student_id=student.id,
        version=document.version,
        document=signature.document,
        signature=signature.signature,
        key_id=signature.key_id,
        create_time=now,
    )
    session.add(row)
    student.privacy_policy = json_format.MessageToDict(document.policy)
    session.flush()
    return row
