"""What the cloud has asked of this device: every plan, and the highest version of each student's policy.

A plan's bins are chosen by the cloud. That they are kept, with the cloud's signature, lets whoever runs the device see
whether bins were aimed at somebody.
"""

import datetime as dt
import hashlib
import sqlite3
import zlib
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.plans import AdmittedPlan

KEEP_ANSWERED = dt.timedelta(days=400)
"""How long answered plans are kept; their charges stay for ever."""
KEEP_DECLINED = 100
"""How many declined plans are kept, the newest ones."""
MAX_DECLINED_BYTES = 256 * 1024
"""A declined plan that is longer, compressed, is kept without its bins."""
MAX_BYTES = 64 * 2**20
"""What answered plans take on the disk at most. Once that is full no round is answered: a cloud that asks very much
must not thereby push out what it asked before."""


@dataclass(frozen=True)
class Decision:
    """One plan and what this device did with it."""

    round: str
    student: str
    """Resource names, in the plan's words: those of a plan that was declined as untrusted may be anything."""
    policy_version: int
    answered: bool
    reason: str
    """Why it was declined."""
    time: dt.datetime
    plan: pb.RoundPlan


def check(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    """Refuses a plan that cannot be kept, or whose policy is older than one that was seen.

    Raises:
        EbbflowError: PLAN_INVALID.
    """
    taken = connection.execute(
        "SELECT COALESCE(SUM(length(signed_plan)), 0) FROM plans WHERE decision = 'answered'"
    ).fetchone()[0]
    if taken > MAX_BYTES:
        message = "this device keeps every plan that it answered, and there is no room for another one"
        raise EbbflowError(Reason.PLAN_INVALID, message, why="history")
    version = admitted.policy_version
    known, policy = _known_policy(connection, admitted.student_id)
    if version < known:
        message = f"the plan's policy has version {version}; this device has seen version {known}"
        raise EbbflowError(Reason.PLAN_INVALID, message, why="policy_version")
    if version == known and _words(admitted) != policy:
        message = f"the plan's policy is another one than this device knows as version {version}"
        raise EbbflowError(Reason.PLAN_INVALID, message, why="policy_changed")


def _words(admitted: AdmittedPlan) -> bytes:
    return admitted.plan.policy.SerializeToString(deterministic=True)


def _known_policy(connection: sqlite3.Connection, student: str) -> tuple[int, bytes]:
    row = connection.execute("SELECT version, policy FROM policies WHERE student = ?", (student,)).fetchone()
    return (int(row[0]), bytes(row[1])) if row else (0, b"")


def note_answered(connection: sqlite3.Connection, admitted: AdmittedPlan, now: dt.datetime) -> None:
    """Keeps a plan in the transaction that answers it."""
    note_policy(connection, admitted)
    plan, packed = admitted.plan, zlib.compress(admitted.signed_plan)
    row = (admitted.plan_sha256, plan.round, plan.student, admitted.policy_version, "answered", "")
    _write(connection, (*row, now.timestamp(), packed))


def note_policy(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    """Keeps a student's policy if it is newer than the one that is known."""
    connection.execute(
        "INSERT INTO policies (student, version, policy) VALUES (?, ?, ?) ON CONFLICT DO UPDATE"
        " SET version = excluded.version, policy = excluded.policy WHERE excluded.version > policies.version",
        (admitted.student_id, admitted.policy_version, _words(admitted)),
    )


def note_declined(connection: sqlite3.Connection, signed: pb.SignedPlan, reason: str, now: dt.datetime) -> None:
    """Keeps a plan that is not answered; one that was answered before stays so."""
    plan = _plan_of(signed)
    packed = zlib.compress(signed.SerializeToString(deterministic=True))
    kept = packed if len(packed) <= MAX_DECLINED_BYTES else b""
    digest = hashlib.sha256(signed.plan).digest()
    row = (digest, plan.round[:256], plan.student[:256], _version_of(plan), "declined", reason, now.timestamp(), kept)
    _write(connection, row)
    connection.execute(
        "DELETE FROM plans WHERE decision = 'declined' AND sha256 NOT IN"
        " (SELECT sha256 FROM plans WHERE decision = 'declined' ORDER BY decide_time DESC, sha256 LIMIT ?)",
        (KEEP_DECLINED,),
    )


def _write(connection: sqlite3.Connection, row: tuple[object, ...]) -> None:
    connection.execute(
        "INSERT INTO plans (sha256, round, student, policy_version, decision, reason, decide_time, signed_plan)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET decision = excluded.decision,"
        " reason = excluded.reason, decide_time = excluded.decide_time, signed_plan = excluded.signed_plan"
        " WHERE plans.decision = 'declined'",
        row,
    )


def forget_old(connection: sqlite3.Connection, now: dt.datetime) -> None:
    """Removes plans that were decided about long ago."""
    connection.execute("DELETE FROM plans WHERE decide_time < ?", ((now - KEEP_ANSWERED).timestamp(),))


def decisions(connection: sqlite3.Connection, limit: int) -> list[Decision]:
    """Returns the last plans, newest first."""
    rows = connection.execute(
        "SELECT round, student, policy_version, decision, reason, decide_time, signed_plan FROM plans"
        " ORDER BY decide_time DESC, round LIMIT ?",
        (limit,),
    ).fetchall()
    return [_decision(*row) for row in rows]


def policies(connection: sqlite3.Connection) -> dict[str, tuple[int, pb.PrivacyPolicy]]:
    """Returns the version and the words of each student's newest policy, by the student's id."""
    rows = connection.execute("SELECT student, version, policy FROM policies").fetchall()
    return {row[0]: (row[1], pb.PrivacyPolicy.FromString(row[2])) for row in rows}


def _decision(
    round_: str, student: str, version: int, decision: str, reason: str, time_s: float, packed: bytes
) -> Decision:
    signed = pb.SignedPlan.FromString(zlib.decompress(packed)) if packed else pb.SignedPlan()
    time = dt.datetime.fromtimestamp(time_s, dt.UTC)
    return Decision(round_, student, version, decision == "answered", reason, time, _plan_of(signed))


def _plan_of(signed: pb.SignedPlan) -> pb.RoundPlan:
    try:
        return pb.RoundPlan.FromString(signed.plan)
    except DecodeError:
        return pb.RoundPlan()


def _version_of(plan: pb.RoundPlan) -> int:
    try:
        return int(pb.PolicyDocument.FromString(plan.signed_policy.document).version)
    except DecodeError:
        return 0
