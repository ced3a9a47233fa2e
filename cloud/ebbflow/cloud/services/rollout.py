"""RolloutService: staged assignments of releases, driven by `ebbflow.cloud.rollout`."""

import datetime as dt
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.api.v1 import rollout_pb2_grpc
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.answers import remember
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import Rollout
from ebbflow.cloud.rollout import results, signed, store
from ebbflow.cloud.services import specs, watch
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import rollouts
from ebbflow.cloud.services.hub import Hub
from ebbflow.cloud.services.student import find as find_student
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]

ENDED = frozenset({pb.Rollout.STATE_SUCCEEDED, pb.Rollout.STATE_ABORTED, pb.Rollout.STATE_SUPERSEDED})
DEFAULT_FAILURE_RATE = 0.05
_Verb = Callable[[Session, str, dt.datetime], Rollout]
_Request = pb.CreateRolloutRequest | pb.RollBackRequest
_Started = TypeVar("_Started", pb.CreateRolloutResponse, pb.RollBackResponse)


class RolloutService(rollout_pb2_grpc.RolloutServiceServicer):
    """See rollout.proto."""

    def __init__(self, cloud: Cloud, hub: Hub) -> None:
        self._cloud = cloud
        self._hub = hub

    async def CreateRollout(self, request: pb.CreateRolloutRequest, context: Context) -> pb.CreateRolloutResponse:
        """Starts one, or lets it wait for a second person."""
        call = current()
        student_id, _ = names.parse_release(request.rollout.release)

        def create(session: Session, now: dt.datetime) -> pb.CreateRolloutResponse:
            spec = specs.of(request.rollout, find_student(session, student_id), call.actor)
            row = store.create(session, spec, now)
            signed.require(session, student_id, spec.number)
            return pb.CreateRolloutResponse(rollout=_message(session, row, now))

        return await self._once(request, create, pb.CreateRolloutResponse)

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        """Brings every device to an earlier release at once."""
        call, student_id = current(), names.parse(request.student, "students")
        number = _number_of(request.release, student_id) if request.release else None

        def roll_back(session: Session, now: dt.datetime) -> pb.RollBackResponse:
            find_student(session, student_id)
            row = store.roll_back(session, student_id, number, call.actor, now)
            signed.require(session, student_id, row.release_number)
            return pb.RollBackResponse(rollout=_message(session, row, now))

        return await self._once(request, roll_back, pb.RollBackResponse)

    async def PreviewRollout(self, request: pb.PreviewRolloutRequest, context: Context) -> pb.PreviewRolloutResponse:
        """Says what CreateRollout would do."""
        actor, wanted, rate = current().actor, request.rollout, request.failure_rate or DEFAULT_FAILURE_RATE
        student_id, _ = names.parse_release(wanted.release)
        if not 0 < rate < 1:
            message = "failure_rate is above 0 and below 1"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="failure_rate")

        def preview(session: Session) -> pb.PreviewRolloutResponse:
            spec = specs.of(wanted, find_student(session, student_id), actor)
            found = store.preview(session, spec, clock.now())
            signed.require(session, student_id, spec.number)
            return rollouts.preview(spec, found, rate)

        return await self._cloud.read(preview)

    async def GetRollout(self, request: pb.GetRolloutRequest, context: Context) -> pb.GetRolloutResponse:
        """Returns one."""
        id_ = names.parse(request.name, "rollouts")
        return pb.GetRolloutResponse(rollout=await self._cloud.read(lambda session: _read(session, id_)))

    async def ListRollouts(self, request: pb.ListRolloutsRequest, context: Context) -> pb.ListRolloutsResponse:
        """Returns a page, newest first."""
        query = sa.select(Rollout)
        if request.student:
            query = query.where(Rollout.student_id == names.parse(request.student, "students"))
        keys = [Rollout.create_time, Rollout.id]

        def work(session: Session) -> pb.ListRolloutsResponse:
            rows, token = page(session, query, keys, request.page_size, request.page_token, descending=True)
            now = clock.now()
            return pb.ListRolloutsResponse(
                rollouts=[_message(session, row, now) for row in rows], next_page_token=token
            )

        return await self._cloud.read(work)

    async def WatchRollout(
        self, request: pb.WatchRolloutRequest, context: Context
    ) -> AsyncIterator[pb.WatchRolloutResponse]:
        """Streams one until it has ended."""
        id_ = names.parse(request.name, "rollouts")
        async for message in watch.changes(
            self._cloud, lambda session: _read(session, id_), lambda message: message.state in ENDED
        ):
            yield pb.WatchRolloutResponse(rollout=message)

    async def PauseRollout(self, request: pb.PauseRolloutRequest, context: Context) -> pb.PauseRolloutResponse:
        """Stops assigning further devices."""
        return pb.PauseRolloutResponse(rollout=await self._act(request.name, store.pause))

    async def ResumeRollout(self, request: pb.ResumeRolloutRequest, context: Context) -> pb.ResumeRolloutResponse:
        """Goes on after a pause or a halt."""
        return pb.ResumeRolloutResponse(rollout=await self._act(request.name, store.resume))

    async def AbortRollout(self, request: pb.AbortRolloutRequest, context: Context) -> pb.AbortRolloutResponse:
        """Ends one; its devices go back to what they had."""
        return pb.AbortRolloutResponse(rollout=await self._act(request.name, store.abort))

    async def ApproveRollout(self, request: pb.ApproveRolloutRequest, context: Context) -> pb.ApproveRolloutResponse:
        """Lets one begin that waits for a second person."""
        actor = current().actor

        def approve(session: Session, id_: str, now: dt.datetime) -> Rollout:
            row = store.approve(session, id_, actor, now)
            signed.require(session, row.student_id, row.release_number)
            return row

        return pb.ApproveRolloutResponse(rollout=await self._act(request.name, approve))

    async def RetryRollout(self, request: pb.RetryRolloutRequest, context: Context) -> pb.RetryRolloutResponse:
        """Gives failed devices another try."""
        agents = {names.parse(name, "agents") for name in request.agents}

        def retry(session: Session, id_: str, now: dt.datetime) -> Rollout:
            return store.retry(session, id_, agents, now)

        return pb.RetryRolloutResponse(rollout=await self._act(request.name, retry))

    async def _act(self, name: str, verb: _Verb) -> pb.Rollout:
        id_ = names.parse(name, "rollouts")
        answer = await self._cloud.change(lambda session, now: _message(session, verb(session, id_, now), now))
        self._hub.nudge()
        return answer

    async def _once(
        self, request: _Request, act: Callable[[Session, dt.datetime], _Started], kind: type[_Started]
    ) -> _Started:
        """Starts a rollout, or returns the one that this very request started before."""
        call = current()

        def work(session: Session, now: dt.datetime) -> _Started:
            answer = remember(session, call.actor, request.request_id, request, now, lambda: act(session, now), kind)
            call.resource = answer.rollout.name
            return answer

        answer = await self._cloud.change(work)
        self._hub.nudge()
        return answer


def _number_of(release: str, student_id: str) -> int:
    of_student, number = names.parse_release(release)
    if of_student != student_id:
        message = f"{release} is no release of students/{student_id}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="release")
    return number


def _read(session: Session, id_: str) -> pb.Rollout:
    return _message(session, store.find(session, id_), clock.now())


def _message(session: Session, row: Rollout, now: dt.datetime) -> pb.Rollout:
    session.flush()
    return rollouts.rollout(row, results.of(session, row, now), now)
