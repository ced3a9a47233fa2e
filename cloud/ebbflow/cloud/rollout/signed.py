"""What the signed metadata forbids: every device would refuse it, so nobody need try."""

from sqlalchemy.orm import Session

from ebbflow.cloud.release import repository, rules
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason


def require(session: Session, student_id: str, number: int) -> None:
    """Refuses a release below the lowest that the signed list allows.

    Raises:
        EbbflowError: RELEASE_TOO_OLD.
    """
    least = rules.min_releases(repository.verified_student(session)).get(student_id, 0)
    if number < least:
        name = names.release(student_id, number)
        message = f"the signed metadata forbids {name}: the lowest release is {least}"
        raise EbbflowError(Reason.RELEASE_TOO_OLD, message, release=name, min_release=least)
