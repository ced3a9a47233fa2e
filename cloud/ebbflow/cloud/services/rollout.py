"""RolloutService: staged assignments of releases, driven by `ebbflow.cloud.rollout`."""

import datetime as dt
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.api.v1 import rollout_pb2_grpc
from ebbflow.cloud.registry.answers import remember
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import Rollout
from ebbflow.cloud.release import repository, rules
from ebbflow.cloud.rollout import store, wire
from ebbflow.cloud.services import watch
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import rollouts
from ebbflow.cloud.services.hub import Hub
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]

ENDED = frozenset({pb.Rollout.STATE_SUCCEEDED, pb.Rollout.STATE_ABORTED, pb.Rollout.STATE_SUPERSEDED})
_Verb = Callable[[Session, str, dt.datetime], Rollout]


class RolloutService(rollout_pb2_grpc.RolloutServiceServicer):
    """See rollout.proto."""

    def __init__(self, cloud: Cloud, hub: Hub) -> None:
        self._cloud = cloud
        self._hub = hub

    async def CreateRollout(self, request: pb.CreateRolloutRequest, context: Context) -> pb.CreateRolloutResponse:
        """Starts one."""
        call = current()
        student_id, number = names.parse_release(request.rollout.release)
        plan = [wire.phase_of(phase) for phase in request.rollout.phases]

        def work(session: Session, now: dt.datetime) -> pb.CreateRolloutResponse:
            def act() -> pb.CreateRolloutResponse:
                _check_age(session, student_id, number)
                row = store.create(session, student_id, number, plan, now)
                return pb.CreateRolloutResponse(rollout=_message(session, row))

            answer = remember(session, call.actor, request.request_id, request, now, act, pb.CreateRolloutResponse)
            call.resource = answer.rollout.name
            return answer

        answer = await self._cloud.change(work)
        self._hub.nudge()
        return answer

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
            counts = store.counts(session, [row.id for row in rows])
            found = [rollouts.rollout(row, counts.get(row.id, {})) for row in rows]
            return pb.ListRolloutsResponse(rollouts=found, next_page_token=token)

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

    async def _act(self, name: str, verb: _Verb) -> pb.Rollout:
        id_ = names.parse(name, "rollouts")
        answer = await self._cloud.change(lambda session, now: _message(session, verb(session, id_, now)))
        self._hub.nudge()
        return answer


def _check_age(session: Session, student_id: str, number: int) -> None:
    """Refuses early what every device would refuse."""
    least = rules.min_releases(repository.verified_student(session)).get(student_id, 0)
    if number < least:
        name = names.release(student_id, number)
        message = f"the signed metadata forbids {name}: the lowest release is {least}"
        raise EbbflowError(Reason.RELEASE_TOO_OLD, message, release=name, min_release=least)


def _read(session: Session, id_: str) -> pb.Rollout:
    return _message(session, store.find(session, id_))


def _message(session: Session, row: Rollout) -> pb.Rollout:
    return rollouts.rollout(row, store.counts(session, [row.id]).get(row.id, {}))
