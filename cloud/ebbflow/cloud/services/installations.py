"""What agents report of releases on their devices."""

import datetime as dt
import math
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.cloud.registry.tables import Assignment, Release
from ebbflow.cloud.rollout import store
from ebbflow.cloud.services.convert.common import from_json, to_json
from ebbflow.cloud.services.convert.releases import KINDS
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

_REASON = re.compile(r"[A-Z0-9_]{0,64}")
FINAL = (pb.INSTALLATION_STATE_SERVING, pb.INSTALLATION_STATE_FAILED)
UNDER_WAY = (pb.INSTALLATION_STATE_FETCHING, pb.INSTALLATION_STATE_DEFERRED)
_MOST_BYTES = 2**48
"""More is no download: sums over a fleet must stay within 64 bits."""


def report(session: Session, agent_id: str, installation: pb.Installation, now: dt.datetime) -> None:
    """Keeps a report and tells the rollout that it is about. Doing so again changes nothing.

    Raises:
        EbbflowError: INVALID_REQUEST if it names no state or no release of its student, or waits without saying until
            when; STUDENT_NOT_FOUND if the agent was never given that student.
    """
    student_id, number = _subject(installation)
    store.lock(session, student_id)
    assignment = session.get(Assignment, (agent_id, student_id), populate_existing=True)
    if assignment is None:
        message = f"this agent was never given {installation.student}"
        raise EbbflowError(Reason.STUDENT_NOT_FOUND, message, student=installation.student)
    assignment.installation = to_json(installation)
    if installation.state == pb.INSTALLATION_STATE_SERVING:
        assignment.serving_number = number
    session.flush()
    if installation.state in UNDER_WAY:
        store.fetching(session, agent_id, student_id, number, now, resume_time=_resume_time(installation))
        return
    release = session.get(Release, (student_id, number))
    store.answer(
        session,
        agent_id,
        student_id,
        number,
        now,
        succeeded=installation.state == pb.INSTALLATION_STATE_SERVING,
        reason=installation.reason,
        probe_loss=_probe_loss(installation),
        fetched_bytes=min(installation.fetched_bytes, _MOST_BYTES),
        full_bytes=full_bytes(release.targets, installation.precision) if release else 0,
    )


def full_bytes(targets: Mapping[str, Any], precision: "pb.Precision.ValueType") -> int:
    """What a device without anything to start from fetches of a release: manifest, tokenizer and its variant.

    Args:
        targets: column `targets` of the release.
        precision: the variant; one that the release does not have counts nothing.
    """
    wanted = {"manifest", "tokenizer", KINDS.get(precision, "")}
    return sum(int(file["size_bytes"]) for file in targets.values() if file["kind"] in wanted)


def heal(session: Session, agent_id: str, installation: pb.Installation, now: dt.datetime) -> None:
    """Takes a report from a heartbeat, in case the agent's own call never arrived; ignores what is older or odd."""
    if installation.state not in {*FINAL, pb.INSTALLATION_STATE_DEFERRED}:
        return
    try:
        student_id, _ = _subject(installation)
    except EbbflowError:
        return
    assignment = session.get(Assignment, (agent_id, student_id))
    if assignment is None:
        return
    kept = from_json(assignment.installation, pb.Installation)
    if not _same(kept, installation) and kept.update_time.ToNanoseconds() <= installation.update_time.ToNanoseconds():
        report(session, agent_id, installation, now)


def _subject(installation: pb.Installation) -> tuple[str, int]:
    student_id, number = names.parse_release(installation.release)
    if installation.student != names.make("students", student_id):
        message = "installation.student is not the release's student"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="installation.student")
    if installation.state not in {*FINAL, *UNDER_WAY}:
        raise EbbflowError(Reason.INVALID_REQUEST, "installation.state must be said", field="installation.state")
    if (installation.state == pb.INSTALLATION_STATE_DEFERRED) != installation.HasField("resume_time"):
        message = "installation.resume_time goes with DEFERRED, and with no other state"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="installation.resume_time")
    _resume_time(installation)
    if not _REASON.fullmatch(installation.reason):
        message = "installation.reason must be one word in capitals"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="installation.reason")
    return student_id, number


def _same(kept: pb.Installation, heard: pb.Installation) -> bool:
    return (kept.release, kept.state, kept.resume_time) == (heard.release, heard.state, heard.resume_time)


def _resume_time(installation: pb.Installation) -> dt.datetime | None:
    """When an agent that waits goes on; None if it does not wait."""
    if installation.state != pb.INSTALLATION_STATE_DEFERRED:
        return None
    try:
        return installation.resume_time.ToDatetime(dt.UTC)
    except (OverflowError, ValueError):
        message = "installation.resume_time is no time"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="installation.resume_time") from None


def _probe_loss(installation: pb.Installation) -> float | None:
    """The measured loss; None if nothing, or nothing that can be averaged, was measured."""
    loss = installation.probe_loss
    return loss if math.isfinite(loss) and loss > 0 else None
