"""The audit log: every mutating call, with who, what and how it ended."""

import datetime as dt

import grpc
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import AuditEntry
from ebbflow.cloud.services.call import Call
from ebbflow.common.errors import EbbflowError

ANONYMOUS_PER_MINUTE = 60


class Allowance:
    """How many failures of unknown peers are kept: nobody without a certificate can fill the disk."""

    def __init__(self) -> None:
        self._minute: dt.datetime | None = None
        self._taken = 0

    def take(self, now: dt.datetime) -> bool:
        """Whether one more may be kept in this minute."""
        minute = now.replace(second=0, microsecond=0)
        if minute != self._minute:
            self._minute, self._taken = minute, 0
        self._taken += 1
        return self._taken <= ANONYMOUS_PER_MINUTE


def record(session: Session, call: Call, code: str, now: dt.datetime, actor: str = "") -> None:
    """Writes an entry; for a success, in the very transaction that did it. `actor` stands in for the caller."""
    session.add(
        AuditEntry(
            create_time=now,
            actor=(actor or call.actor)[:128],
            method=call.method[:128],
            resource=_printable(call.resource)[:256],
            code=code,
            request_id=_printable(call.request_id)[:64],
        )
    )


def code_of(error: BaseException) -> str:
    """The name of the status that a failure ends with."""
    if isinstance(error, EbbflowError):
        return error.code.name
    return grpc.StatusCode.INTERNAL.name


def _printable(text: str) -> str:
    """What a caller wrote, without characters that a database refuses: no call evades the log by an odd name."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:256])
