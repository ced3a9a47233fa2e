"""RoundService: collections of feedback, carried out by `ebbflow.cloud.feedback`."""

import asyncio
import contextlib
import datetime as dt
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2, round_pb2_grpc
from ebbflow.api.v1 import round_pb2 as pb
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback import adapters, cohort, population
from ebbflow.cloud.feedback import rounds as feedback
from ebbflow.cloud.feedback.plans import DEFAULT_MAX_USERS, DEFAULT_NEAR_MICRO, read_bins
from ebbflow.cloud.feedback.round_rows import find
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
from ebbflow.common.privacy.plans import runs_student

Context = grpc.aio.ServicerContext[Any, Any]

LEAST_VOTED = dt.timedelta(seconds=10)
"""Least duration of a round of votes: agents send them some seconds after they got the plan."""
LEAST_STUDIED = dt.timedelta(minutes=10)
"""Least duration where the student computes for every user: agents send that 5 minutes after they got the plan."""


class RoundService(round_pb2_grpc.RoundServiceServicer):
    """See round.proto."""

    def __init__(self, cloud: Cloud, hub: Hub) -> None:
        self._cloud = cloud
        self._hub = hub

    async def OpenRound(self, request: pb.OpenRoundRequest, context: Context) -> pb.OpenRoundResponse:
        """Signs a plan and asks every agent of the student for a batch."""
        cloud, call, student_id = self._cloud, current(), names.parse(request.student, "students")
        check_options(request)
        _check_duration(request)
        bins = await self._bins(request, student_id)

        def open_(session: Session, now: dt.datetime) -> pb.OpenRoundResponse:
            student = find_student(session, student_id)
            asks_adapter = request.HasField("adapter")
            row = feedback.open_round(
                session,
                student,
                bins,
                cloud.plan_signer,
                now,
                duration(request.duration, feedback.DEFAULT_DURATION),
                duration(request.lookback, feedback.DEFAULT_LOOKBACK),
                metrics=request.metrics,
                max_users=request.max_users or DEFAULT_MAX_USERS,
                measure=request.measure,
                near_micro=request.near_micro or DEFAULT_NEAR_MICRO,
                adapter=_adapter_maker(session, cloud.blobs, request, student_id) if asks_adapter else None,
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

    async def _bins(self, request: pb.OpenRoundRequest, student_id: str) -> list[feedback_pb2.Bin]:
        """What is voted over: the prompts of a generation, or the topics of the corpus; nothing for adapter updates."""
        cloud = self._cloud
        student = await cloud.read(lambda session: find_student(session, student_id))
        if request.HasField("adapter"):
            return []
        if request.population:
            return await cloud.read(lambda session: population.bins(session, student_id, request.population))
        return await cloud.in_thread(cloud.files, lambda: read_bins(cloud.blobs, student.corpus_sha256, student.topics))

    async def CloseRound(self, request: pb.CloseRoundRequest, context: Context) -> pb.CloseRoundResponse:
        """Refuses further batches and aggregates those that came."""
        id_ = names.parse(request.name, "rounds")
        # What was begun ends even if the caller goes away, who may not wait as long as many large updates take.
        return pb.CloseRoundResponse(round=await asyncio.shield(self._close(id_)))

    async def _close(self, id_: str) -> pb.Round:
        for _ in range(feedback.DRAFTS):
            with contextlib.suppress(feedback.StaleDraftError):
                return await self._close_once(id_, ahead=True)
        return await self._close_once(id_, ahead=False)

    async def _close_once(self, id_: str, *, ahead: bool) -> pb.Round:
        """Closes a round, and works out ahead of the transaction what it says, or else in it."""
        cloud = self._cloud
        draft = await cloud.read(lambda session: feedback.look(session, id_))
        if ahead:
            draft = await cloud.in_thread(cloud.files, partial(feedback.work_out, draft, cloud.blobs))

        def work(session: Session, _: dt.datetime) -> pb.Round:
            return _message(session, feedback.close_round(session, id_, cloud.blobs, draft))

        answer = await cloud.change(work)
        self._hub.nudge()
        return answer

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


def check_options(request: pb.OpenRoundRequest) -> None:
    """Refuses options that contradict each other.

    Raises:
        EbbflowError: INVALID_REQUEST.
    """
    if not request.HasField("adapter"):
        return
    for field in ("metrics", "population", "measure", "near_micro"):
        if getattr(request, field):
            message = f"a round of adapter updates has no votes, so {field} makes no sense"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field=field)


def _check_duration(request: pb.OpenRoundRequest) -> None:
    """Refuses a round that would be over before any agent has answered it.

    Raises:
        EbbflowError: INVALID_REQUEST.
    """
    computes = runs_student(request)
    least = LEAST_STUDIED if computes else LEAST_VOTED
    if duration(request.duration, feedback.DEFAULT_DURATION) < least:
        why = "minutes pass while the student computes on the device" if computes else "agents take seconds to answer"
        message = f"duration must be at least {least.total_seconds():.0f} seconds: {why}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="duration")


def _adapter_maker(
    session: Session, blobs: BlobStore, request: pb.OpenRoundRequest, student_id: str
) -> feedback.AdapterMaker:
    """Plans an adapter for the release that most of the cohort serve."""

    def make(policy: feedback_pb2.PrivacyPolicy, members: Sequence[cohort.Member]) -> feedback_pb2.AdapterPlan:
        release = cohort.serving_most(members)
        config = adapters.config_of(session, blobs, student_id, release)
        able = cohort.able(members, release, request.adapter.max_staleness)
        return adapters.make_adapter_plan(request.adapter, release, config, policy, able)

    return make


def _message(session: Session, row: Round) -> pb.Round:
    (message,) = _messages(session, [row])
    return message


def _messages(session: Session, rows: Sequence[Round]) -> list[pb.Round]:
    counts = feedback.counts(session, [row.id for row in rows])
    return [rounds.round_(row, rounds.Counts(*counts[row.id])) for row in rows]
