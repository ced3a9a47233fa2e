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
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation import private_account, private_texts
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
                row = _queue(session, wanted, private, cloud.blobs, now)
                return pb.CreateDistillationResponse(distillation=distillations.distillation(row))

            answer = remember(session, call.actor, request.request_id, request, now, act, pb.CreateDistillationResponse)
            call.resource = answer.distillation.name
            return answer

        answer = await cloud.change(work)
        await self._add_account(answer.distillation)
        return answer

    async def GetDistillation(self, request: pb.GetDistillationRequest, context: Context) -> pb.GetDistillationResponse:
        """Returns one."""
        row = await self._cloud.read(lambda session: find(session, names.parse(request.name, "distillations")))
        message = distillations.distillation(row)
        await self._add_account(message)
        return pb.GetDistillationResponse(distillation=message)

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

    async def DeletePrivateCorpus(
        self, request: pb.DeletePrivateCorpusRequest, context: Context
    ) -> pb.DeletePrivateCorpusResponse:
        """Deletes private texts that nobody needs any more."""
        blobs = self._cloud.blobs

        def work(session: Session, now: dt.datetime) -> pb.DeletePrivateCorpusResponse:
            sha256 = _private_corpus(session, request)
            return pb.DeletePrivateCorpusResponse(deleted=private_texts.delete(session, blobs, sha256, now))

        return await self._cloud.change(work)

    async def _add_account(self, message: pb.Distillation) -> None:
        """Completes an answer by what all training on the same private texts costs."""
        if not message.HasField("private_training"):
            return
        id_ = names.parse(message.name, "distillations")
        runs = await self._cloud.read(
            lambda session: private_account.runs_on(session, find(session, id_).private_corpus_sha256)
        )
        account = await self._cloud.in_thread(self._cloud.files, lambda: distillations.account(runs))
        message.private_account.CopyFrom(account)


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


def _private_corpus(session: Session, request: pb.DeletePrivateCorpusRequest) -> str:
    """Returns the hash of the texts that a request means."""
    if bool(request.name) == bool(request.private_corpus_sha256):
        raise EbbflowError(Reason.INVALID_REQUEST, "give either name or private_corpus_sha256", field="name")
    if request.private_corpus_sha256:
        return sources.private_sha256(request.private_corpus_sha256, "private_corpus_sha256")
    sha256 = find(session, names.parse(request.name, "distillations")).private_corpus_sha256
    if not sha256:
        raise EbbflowError(Reason.INVALID_REQUEST, f"{request.name} has no private texts", field="name")
    return sha256


def _queue(
    session: Session, wanted: pb.Distillation, private: sources.Private, blobs: BlobStore, now: dt.datetime
) -> Distillation:
    student = find_student(session, names.parse(wanted.student, "students"))
    found = sources.resolve(session, wanted, student)
    if private.corpus_sha256:
        private_texts.reserve(session, blobs, private.corpus_sha256)
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
