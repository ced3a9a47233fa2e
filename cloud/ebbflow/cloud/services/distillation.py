"""DistillationService: queues runs, which workers claim."""

import datetime as dt
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import distillation_pb2 as pb
from ebbflow.api.v1 import distillation_pb2_grpc
from ebbflow.cloud.registry.answers import remember
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import Distillation, DistillationState
from ebbflow.cloud.services import sources, watch
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import distillations
from ebbflow.cloud.services.convert.common import to_json
from ebbflow.cloud.services.student import find as find_student
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]

ENDED = frozenset({pb.Distillation.STATE_SUCCEEDED, pb.Distillation.STATE_FAILED, pb.Distillation.STATE_CANCELLED})
_LIVING = (DistillationState.QUEUED, DistillationState.RUNNING)


class DistillationService(distillation_pb2_grpc.DistillationServiceServicer):
    """See distillation.proto."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def CreateDistillation(
        self, request: pb.CreateDistillationRequest, context: Context
    ) -> pb.CreateDistillationResponse:
        """Queues a run."""
        cloud, call, wanted = self._cloud, current(), request.distillation
        private = await cloud.in_thread(cloud.files, lambda: sources.private(wanted, cloud.blobs))

        def work(session: Session, now: dt.datetime) -> pb.CreateDistillationResponse:
            def act() -> pb.CreateDistillationResponse:
                row = _queue(session, wanted, private, now)
                return pb.CreateDistillationResponse(distillation=distillations.distillation(row))

            answer = remember(session, call.actor, request.request_id, request, now, act, pb.CreateDistillationResponse)
            call.resource = answer.distillation.name
            return answer

        return await cloud.change(work)

    async def GetDistillation(self, request: pb.GetDistillationRequest, context: Context) -> pb.GetDistillationResponse:
        """Returns one."""
        row = await self._cloud.read(lambda session: find(session, names.parse(request.name, "distillations")))
        return pb.GetDistillationResponse(distillation=distillations.distillation(row))

    async def ListDistillations(
        self, request: pb.ListDistillationsRequest, context: Context
    ) -> pb.ListDistillationsResponse:
        """Returns a page, newest first."""
        query = sa.select(Distillation)
        if request.student:
            query = query.where(Distillation.student_id == names.parse(request.student, "students"))
        keys = [Distillation.create_time, Distillation.id]
        rows, token = await self._cloud.read(
            lambda session: page(session, query, keys, request.page_size, request.page_token, descending=True)
        )
        return pb.ListDistillationsResponse(distillations=map(distillations.distillation, rows), next_page_token=token)

    async def WatchDistillation(
        self, request: pb.WatchDistillationRequest, context: Context
    ) -> AsyncIterator[pb.WatchDistillationResponse]:
        """Streams one until it has ended."""
        id_ = names.parse(request.name, "distillations")
        async for message in watch.changes(
            self._cloud,
            lambda session: distillations.distillation(find(session, id_)),
            lambda message: message.state in ENDED,
        ):
            yield pb.WatchDistillationResponse(distillation=message)

    async def CancelDistillation(
        self, request: pb.CancelDistillationRequest, context: Context
    ) -> pb.CancelDistillationResponse:
        """Asks the worker to stop: its next heartbeat is refused."""
        id_ = names.parse(request.name, "distillations")

        def work(session: Session, now: dt.datetime) -> pb.CancelDistillationResponse:
            stop = (
                sa.update(Distillation)
                .where(Distillation.id == id_, Distillation.state.in_(_LIVING))
                .values(state=DistillationState.CANCELLED, leased_by=None, leased_until=None, update_time=now)
            )
            stopped = session.execute(stop).rowcount  # type: ignore[attr-defined]
            row = find(session, id_)
            if not stopped and row.state is not DistillationState.CANCELLED:
                message = f"{request.name} is {row.state.value} and cannot be cancelled"
                raise EbbflowError(Reason.STATE_CONFLICT, message, state=row.state.value)
            return pb.CancelDistillationResponse(distillation=distillations.distillation(row))

        return await self._cloud.change(work)


def find(session: Session, id_: str) -> Distillation:
    """Returns a distillation.

    Raises:
        EbbflowError: DISTILLATION_NOT_FOUND.
    """
    row = session.get(Distillation, id_)
    if row is None:
        name = names.make("distillations", id_)
        raise EbbflowError(Reason.DISTILLATION_NOT_FOUND, f"there is no {name}", distillation=name)
    return row


def _queue(session: Session, wanted: pb.Distillation, private: sources.Private, now: dt.datetime) -> Distillation:
    student = find_student(session, names.parse(wanted.student, "students"))
    found = sources.resolve(session, wanted, student)
    row = Distillation(
        id=secrets.token_hex(6),
        student_id=student.id,
        state=DistillationState.QUEUED,
        recipe=to_json(wanted.recipe),
        mixture=found.mixture,
        base_release=found.base_release,
        round_id=found.round_id,
        feedback_epsilon=found.feedback_epsilon,
        population=found.population,
        population_share=found.population_share,
        adapter_round_id=found.adapter_round_id,
        private_corpus_sha256=private.corpus_sha256,
        private_training=private.training,
        create_time=now,
        update_time=now,
    )
    session.add(row)
    session.flush()
    return row
