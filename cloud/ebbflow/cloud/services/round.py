"""RoundService: collections of feedback, carried out by `ebbflow.cloud.feedback`."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import round_pb2 as pb
from ebbflow.api.v1 import round_pb2_grpc
from ebbflow.cloud.feedback import rounds as feedback
from ebbflow.cloud.feedback.plans import read_bins
from ebbflow.cloud.registry.answers import remember
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import Round
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import rounds
from ebbflow.cloud.services.convert.common import duration
from ebbflow.cloud.services.hub import Hub
from ebbflow.cloud.services.student import find as find_student
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]


class RoundService(round_pb2_grpc.RoundServiceServicer):
    """See round.proto."""

    def __init__(self, cloud: Cloud, hub: Hub) -> None:
        self._cloud = cloud
        self._hub = hub

    async def OpenRound(self, request: pb.OpenRoundRequest, context: Context) -> pb.OpenRoundResponse:
        """Signs a plan and asks every agent of the student for a batch."""
        cloud, call, student_id = self._cloud, current(), names.parse(request.student, "students")
        student = await cloud.read(lambda session: find_student(session, student_id))
        bins = await cloud.in_thread(cloud.files, lambda: read_bins(cloud.blobs, student.corpus_sha256, student.topics))

        def open_(session: Session, now: dt.datetime) -> pb.OpenRoundResponse:
            row = feedback.open_round(
                session,
                find_student(session, student_id),
                bins,
                cloud.plan_signer,
                now,
                duration(request.duration, feedback.DEFAULT_DURATION),
                duration(request.lookback, feedback.DEFAULT_LOOKBACK),
            )
            session.flush()
            return pb.OpenRoundResponse(round=_message(session, row))

        def work(session: Session, now: dt.datetime) -> pb.OpenRoundResponse:
            answer = remember(
                session,
                call.actor,
                request.request_id,
                request,
                now,
                lambda: open_(session, now),
                pb.OpenRoundResponse,
            )
            call.resource = answer.round.name
            return answer

        answer = await cloud.change(work)
        self._hub.nudge()
        return answer

    async def CloseRound(self, request: pb.CloseRoundRequest, context: Context) -> pb.CloseRoundResponse:
        """Refuses further batches and aggregates those that came."""
        id_ = names.parse(request.name, "rounds")
        answer = await self._cloud.change(lambda session, now: _message(session, feedback.close_round(session, id_)))
        self._hub.nudge()
        return pb.CloseRoundResponse(round=answer)

    async def GetRound(self, request: pb.GetRoundRequest, context: Context) -> pb.GetRoundResponse:
        """Returns one."""
        id_ = names.parse(request.name, "rounds")
        return pb.GetRoundResponse(round=await self._cloud.read(lambda session: _message(session, find(session, id_))))

    async def ListRounds(self, request: pb.ListRoundsRequest, context: Context) -> pb.ListRoundsResponse:
        """Returns a page, newest first."""
        query = sa.select(Round)
        if request.student:
            query = query.where(Round.student_id == names.parse(request.student, "students"))
        keys = [Round.create_time, Round.id]

        def work(session: Session) -> pb.ListRoundsResponse:
            rows, token = page(session, query, keys, request.page_size, request.page_token, descending=True)
            return pb.ListRoundsResponse(rounds=_messages(session, rows), next_page_token=token)

        return await self._cloud.read(work)


def find(session: Session, id_: str) -> Round:
    """Returns a round.

    Raises:
        EbbflowError: ROUND_NOT_FOUND.
    """
    row = session.get(Round, id_)
    if row is None:
        name = names.make("rounds", id_)
        raise EbbflowError(Reason.ROUND_NOT_FOUND, f"there is no {name}", round=name)
    return row


def _message(session: Session, row: Round) -> pb.Round:
    (message,) = _messages(session, [row])
    return message


def _messages(session: Session, rows: Sequence[Round]) -> list[pb.Round]:
    counts = feedback.counts(session, [row.id for row in rows])
    return [rounds.round_(row, rounds.Counts(*counts[row.id])) for row in rows]
