"""What a round's row says, for all that read rounds; `rounds` opens and closes them."""

from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.registry.tables import Round, RoundState
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason


def find(session: Session, round_id: str, *, for_update: bool = False) -> Round:
    """Returns a round.

    Args:
        session: a transaction.
        round_id: which.
        for_update: locks the row and reads it anew.

    Raises:
        EbbflowError: ROUND_NOT_FOUND.
    """
    row = session.get(Round, round_id, with_for_update=for_update, populate_existing=for_update)
    if row is None:
        name = names.make("rounds", round_id)
        raise EbbflowError(Reason.ROUND_NOT_FOUND, f"there is no {name}", round=name)
    return row


def plan_of(row: Round) -> pb.RoundPlan:
    """Returns the plan of a round."""
    return pb.RoundPlan.FromString(row.plan)


def aggregate_of(row: Round) -> round_pb2.Aggregate:
    """Returns what came of a round; empty until it is closed."""
    return json_format.ParseDict(row.aggregate, round_pb2.Aggregate(), ignore_unknown_fields=True)


def check_closed(row: Round, student_id: str, field: str) -> None:
    """Refuses a round that is another student's, or still open.

    Args:
        row: the round.
        student_id: whose it should be.
        field: of the request that names it, for the error.

    Raises:
        EbbflowError: INVALID_REQUEST, STATE_CONFLICT.
    """
    name = names.make("rounds", row.id)
    if row.student_id != student_id:
        message = f"{name} belongs to {names.make('students', row.student_id)}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field=field)
    if row.state is not RoundState.CLOSED:
        raise EbbflowError(Reason.STATE_CONFLICT, f"{name} is still open: close it first", round=name)
