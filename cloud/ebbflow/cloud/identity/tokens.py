"""Enrolment tokens in the registry. The secret is never kept, only its hash."""

import base64
import datetime as dt
import hmac
import secrets
import uuid
from collections.abc import Callable, Mapping

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import EnrolmentToken, SavedAnswer
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.tokens import EnrolmentSecret

DEFAULT_LIFETIME = dt.timedelta(hours=1)
MAX_LIFETIME = dt.timedelta(days=366)
MAX_USES = 1_000_000


def create(
    session: Session,
    authority_sha256: str,
    now: dt.datetime,
    uses: int = 1,
    lifetime: dt.timedelta = DEFAULT_LIFETIME,
    labels: Mapping[str, str] | None = None,
) -> tuple[EnrolmentToken, EnrolmentSecret]:
    """Makes a token.

    Args:
        session: the transaction.
        authority_sha256: hexadecimal hash of the certificate authority, which the token pins.
        now: the current time.
        uses: devices that may use it.
        lifetime: how long it works.
        labels: labels that its agents get.

    Returns:
        The row, and the secret, which exists nowhere else.

    Raises:
        EbbflowError: INVALID_REQUEST naming the wrong field.
    """
    if not 1 <= uses <= MAX_USES:
        raise EbbflowError(Reason.INVALID_REQUEST, f"uses must be 1 to {MAX_USES}", field="uses")
    if not dt.timedelta(0) < lifetime <= MAX_LIFETIME:
        message = f"lifetime must be above 0 and at most {MAX_LIFETIME.days} days"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="lifetime")
    token_id = base64.b32encode(secrets.token_bytes(5)).decode().lower()
    secret = EnrolmentSecret.generate(token_id, authority_sha256)
    row = EnrolmentToken(
        id=token_id,
        secret_sha256=secret.secret_sha256,
        labels=dict(labels or {}),
        uses_left=uses,
        expire_time=now + lifetime,
        create_time=now,
    )
    session.add(row)
    session.flush()
    return row, secret


def redeem(
    session: Session,
    secret: EnrolmentSecret,
    request_id: str,
    public_key_sha256: str,
    now: dt.datetime,
    admit: Callable[[EnrolmentToken], bytes],
) -> bytes:
    """Uses a token once and lets a device in; a retry gets the first answer and uses nothing.

    Everything, the use, what `admit` does and the saved answer, belongs to the caller's transaction.

    Args:
        session: the transaction.
        secret: the token, as the device handed it in.
        request_id: UUID of the request; empty makes the key stand for it.
        public_key_sha256: the key to certify; a retry must bring the same.
        now: the current time.
        admit: registers the device and returns the serialised answer.

    Returns:
        What `admit` returned, this time or the first time.

    Raises:
        EbbflowError: TOKEN_INVALID, TOKEN_EXPIRED, TOKEN_USED_UP, INVALID_REQUEST if `request_id` is no UUID, or
            REQUEST_ID_REUSED if the same request came with another key.
    """
    # The lock makes a retry that overtakes its original wait for it.
    row = session.get(EnrolmentToken, secret.token_id, with_for_update=True)
    known = row.secret_sha256 if row is not None else ""
    if not hmac.compare_digest(known, secret.secret_sha256) or row is None or row.revoke_time is not None:
        raise EbbflowError(Reason.TOKEN_INVALID, "the token is not one of this cloud's, or it was revoked")
    actor, request_id = f"enrolmentTokens/{row.id}", _uuid(request_id) if request_id else public_key_sha256
    saved = session.get(SavedAnswer, (actor, request_id))
    if saved is not None:
        if saved.request_sha256 != public_key_sha256:
            message = "this request_id was used with another key"
            raise EbbflowError(Reason.REQUEST_ID_REUSED, message, request_id=request_id)
        return saved.answer
    _use(session, row, now)
    answer = admit(row)
    session.add(
        SavedAnswer(
            actor=actor, request_id=request_id, request_sha256=public_key_sha256, answer=answer, create_time=now
        )
    )
    return answer


def revoke(session: Session, token_id: str, now: dt.datetime) -> EnrolmentToken:
    """Makes a token useless; doing so again changes nothing.

    Raises:
        EbbflowError: TOKEN_NOT_FOUND.
    """
    row = session.get(EnrolmentToken, token_id, with_for_update=True)
    if row is None:
        raise EbbflowError(
            Reason.TOKEN_NOT_FOUND, f"there is no token {token_id!r}", name=f"enrolmentTokens/{token_id}"
        )
    row.revoke_time = row.revoke_time or now
    return row


def _uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise EbbflowError(Reason.INVALID_REQUEST, "request_id must be a UUID", field="request_id") from error


def _use(session: Session, row: EnrolmentToken, now: dt.datetime) -> None:
    if row.expire_time <= now:
        raise EbbflowError(Reason.TOKEN_EXPIRED, f"the token {row.id} has expired")
    left = (
        sa.update(EnrolmentToken)
        .where(EnrolmentToken.id == row.id, EnrolmentToken.uses_left > 0)
        .values(uses_left=EnrolmentToken.uses_left - 1)
    )
    if session.execute(left).rowcount != 1:  # type: ignore[attr-defined]
        raise EbbflowError(Reason.TOKEN_USED_UP, f"the token {row.id} has no uses left")
