"""First answers to requests with a request_id, so that a retry does nothing twice (AIP-155)."""

import datetime as dt
import hashlib
import uuid
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from google.protobuf.message import Message
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.locks import exclusive
from ebbflow.cloud.registry.tables import SavedAnswer
from ebbflow.common.errors import EbbflowError, Reason

Answer = TypeVar("Answer", bound=Message)


def remember(
    session: Session,
    actor: str,
    request_id: str,
    request: Message,
    now: dt.datetime,
    act: Callable[[], Answer],
    answer_type: type[Answer],
) -> Answer:
    """Acts once for each `request_id` of an actor; afterwards returns the first answer again.

    Acting and remembering are one transaction: the caller's. Without a request_id it always acts.

    Raises:
        EbbflowError: INVALID_REQUEST if `request_id` is no UUID, REQUEST_ID_REUSED if it came with another request.
    """
    if not request_id:
        return act()
    try:
        request_id = str(uuid.UUID(request_id))
    except ValueError as error:
        raise EbbflowError(Reason.INVALID_REQUEST, "request_id must be a UUID", field="request_id") from error
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
    exclusive(session, f"answer/{actor}/{request_id}")
    saved = session.get(SavedAnswer, (actor, request_id))
    if saved is None:
        answer = act()
        session.add(
            SavedAnswer(
                actor=actor,
                request_id=request_id,
                request_sha256=digest,
                answer=answer.SerializeToString(),
                create_time=now,
            )
        )
        return answer
    if saved.request_sha256 != digest:
        message = "this request_id was used with a different request"
        raise EbbflowError(Reason.REQUEST_ID_REUSED, message, request_id=request_id)
    return answer_type.FromString(saved.answer)


def forget(session: Session, before: dt.datetime) -> int:
    """Deletes answers that are older than `before`; returns how many."""
    gone = session.execute(sa.delete(SavedAnswer).where(SavedAnswer.create_time < before))
    return int(gone.rowcount)  # type: ignore[attr-defined]
