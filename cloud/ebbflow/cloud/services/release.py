"""ReleaseService: shows releases and takes them back."""

import datetime as dt
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import release_pb2 as pb
from ebbflow.api.v1 import release_pb2_grpc
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import Release
from ebbflow.cloud.release import withdraw
from ebbflow.cloud.services import comparison, deltas
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import releases
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]

ALL = "students/-"


class ReleaseService(release_pb2_grpc.ReleaseServiceServicer):
    """See release.proto."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def GetRelease(self, request: pb.GetReleaseRequest, context: Context) -> pb.GetReleaseResponse:
        """Returns one."""
        student_id, number = names.parse_release(request.name)
        row = await self._cloud.read(lambda session: find(session, student_id, number))
        return pb.GetReleaseResponse(release=releases.release(row))

    async def ListReleases(self, request: pb.ListReleasesRequest, context: Context) -> pb.ListReleasesResponse:
        """Returns a page, newest first."""
        query = sa.select(Release)
        if request.parent != ALL:
            query = query.where(Release.student_id == names.parse(request.parent, "students"))
        keys = [Release.create_time, Release.student_id, Release.number]
        rows, token = await self._cloud.read(
            lambda session: page(session, query, keys, request.page_size, request.page_token, descending=True)
        )
        return pb.ListReleasesResponse(releases=map(releases.release, rows), next_page_token=token)

    async def CompareReleases(self, request: pb.CompareReleasesRequest, context: Context) -> pb.CompareReleasesResponse:
        """Says what changed between two releases of a student, and what it costs to move."""
        base, target = names.parse_release(request.base), names.parse_release(request.target)
        if base[0] != target[0]:
            message = f"{request.target} is not of the same student as {request.base}"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="target")
        old, new = await self._cloud.read(lambda session: (find(session, *base), find(session, *target)))
        return await comparison.compare(self._cloud, old, new, deltas.time_left_s(context))

    async def RevokeRelease(self, request: pb.RevokeReleaseRequest, context: Context) -> pb.RevokeReleaseResponse:
        """Takes one back for ever."""
        student_id, number = names.parse_release(request.name)
        current().resource = request.name

        def work(session: Session, now: dt.datetime) -> pb.RevokeReleaseResponse:
            row = withdraw.revoke(session, student_id, number, request.reason, now)
            return pb.RevokeReleaseResponse(release=releases.release(row))

        return await self._cloud.change(work)

    async def RaiseMinRelease(self, request: pb.RaiseMinReleaseRequest, context: Context) -> pb.RaiseMinReleaseResponse:
        """Forbids every release below one."""
        student_id, number = names.parse_release(request.name)
        current().resource = request.name

        def work(session: Session, now: dt.datetime) -> pb.RaiseMinReleaseResponse:
            least = withdraw.raise_min_release(session, student_id, number, now)
            return pb.RaiseMinReleaseResponse(name=names.release(student_id, least))

        return await self._cloud.change(work)


def find(session: Session, student_id: str, number: int) -> Release:
    """Returns a release.

    Raises:
        EbbflowError: RELEASE_NOT_FOUND.
    """
    row = session.get(Release, (student_id, number))
    if row is None:
        name = names.release(student_id, number)
        raise EbbflowError(Reason.RELEASE_NOT_FOUND, f"there is no {name}", release=name)
    return row
