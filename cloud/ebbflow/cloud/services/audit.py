"""The audit log: every mutating call, with who, what and how it ended."""

import datetime as dt

import grpc
from sqlalchemy.orm import Session

from ebbflow.cloud.registry.tables import AuditEntry
from ebbflow.cloud.services.call import Call
from ebbflow.common.errors import EbbflowError


def record(session: Session, call: Call, code: str, now: dt.datetime, actor: str = "") -> None:
    """Writes an entry; for a success, in the very transaction that did it. `actor` stands in for the caller."""
    session.add(
        AuditEntry(
            create_time=now,
            actor=(actor or call.actor)[:128],
            method=call.method[:128],
            resource=call.resource[:256],
            code=code,
            request_id=call.request_id[:64],
        )
    )


def code_of(error: BaseException) -> str:
    """The name of the status that a failure ends with."""
    if isinstance(error, EbbflowError):
        return error.code.name
    return grpc.StatusCode.INTERNAL.name
