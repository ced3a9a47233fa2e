"""What agents report of releases on their devices."""

import datetime as dt
import re

from sqlalchemy.orm import Session

from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.cloud.registry.tables import Assignment
from ebbflow.cloud.rollout import store
from ebbflow.cloud.services.convert.common import from_json, to_json
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

_REASON = re.compile(r"[A-Z0-9_]{0,64}")
FINAL = (pb.INSTALLATION_STATE_SERVING, pb.INSTALLATION_STATE_FAILED)


def report(session: Session, agent_id: str, installation: pb.Installation, now: dt.datetime) -> None:
    """Keeps a report and tells the rollout that it is about. Doing so again changes nothing.

    Raises:
        EbbflowError: INVALID_REQUEST if it names no state or no release of its student; STUDENT_NOT_FOUND if the agent
            was never given that student.
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
    if installation.state == pb.INSTALLATION_STATE_FETCHING:
        store.fetching(session, agent_id, student_id, number, now)
    else:
        succeeded = installation.state == pb.INSTALLATION_STATE_SERVING
        store.answer(session, agent_id, student_id, number, now, succeeded=succeeded, reason=installation.reason)


def heal(session: Session, agent_id: str, installation: pb.Installation, now: dt.datetime) -> None:
    """Takes a report from a heartbeat, in case the agent's own call never arrived; ignores what is older or odd."""
    if installation.state not in FINAL:
        return
    try:
        student_id, _ = _subject(installation)
    except EbbflowError:
        return
    assignment = session.get(Assignment, (agent_id, student_id))
    if assignment is None:
        return
    kept = from_json(assignment.installation, pb.Installation)
    same = (kept.release, kept.state) == (installation.release, installation.state)
    if not same and kept.update_time.ToNanoseconds() <= installation.update_time.ToNanoseconds():
        report(session, agent_id, installation, now)


def _subject(installation: pb.Installation) -> tuple[str, int]:
    student_id, number = names.parse_release(installation.release)
    if installation.student != names.make("students", student_id):
        message = "installation.student is not the release's student"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="installation.student")
    if installation.state not in {*FINAL, pb.INSTALLATION_STATE_FETCHING}:
        raise EbbflowError(Reason.INVALID_REQUEST, "installation.state must be said", field="installation.state")
    if not _REASON.fullmatch(installation.reason):
        message = "installation.reason must be one word in capitals"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="installation.reason")
    return student_id, number
