"""ArtefactService: bytes of releases and of the metadata that makes them trusted, in chunks."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import artefact_pb2 as pb
from ebbflow.api.v1 import artefact_pb2_grpc
from ebbflow.cloud.blobs.base import CHUNK_BYTES
from ebbflow.cloud.registry.tables import Assignment, Release, ReleaseState
from ebbflow.cloud.release import repository
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]

MAX_WRITE_BYTES = 1024 * 1024
_DIGEST_BYTES = 32


class ArtefactService(artefact_pb2_grpc.ArtefactServiceServicer):
    """See artefact.proto. However large a file and however many readers: one chunk of each is in memory."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def ReadMetadata(
        self, request: pb.ReadMetadataRequest, context: Context
    ) -> AsyncIterator[pb.ReadMetadataResponse]:
        """Streams one file of trust metadata."""
        content = await self._cloud.read(lambda session: repository.read_metadata(session, request.file_name))
        for begin in range(0, len(content), CHUNK_BYTES):
            yield pb.ReadMetadataResponse(chunk=content[begin : begin + CHUNK_BYTES])

    async def ReadBlob(self, request: pb.ReadBlobRequest, context: Context) -> AsyncIterator[pb.ReadBlobResponse]:
        """Streams a blob from an offset; an agent gets the files of its own students' releases only."""
        cloud, sha256, peer = self._cloud, _digest(request.sha256), current().caller
        if peer.identity.kind == "agent" and not await cloud.read(lambda s: _is_for(s, peer.identity.id, sha256)):
            raise EbbflowError(Reason.BLOB_NOT_FOUND, f"no blob {sha256}", sha256=sha256)
        size_bytes = await cloud.in_thread(cloud.files, lambda: cloud.blobs.size(sha256))
        if request.offset_bytes > size_bytes:
            message = f"offset_bytes is beyond the blob's {size_bytes} bytes"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="offset_bytes")
        chunks = cloud.blobs.open(sha256, request.offset_bytes)
        while chunk := await cloud.in_thread(cloud.files, lambda: next(chunks, b"")):
            yield pb.ReadBlobResponse(chunk=chunk)

    async def WriteBlob(
        self, request_iterator: AsyncIterator[pb.WriteBlobRequest], context: Context
    ) -> pb.WriteBlobResponse:
        """Stores a file. A sender that goes away leaves nothing behind."""
        cloud, call = self._cloud, current()
        upload = _Upload(request_iterator, asyncio.get_running_loop())
        try:
            blob = await cloud.in_thread(cloud.uploads, lambda: cloud.blobs.put(upload.chunks()))
        finally:
            upload.cancelled = True
        call.resource = f"blobs/{blob.sha256}"
        await cloud.change(lambda _session, _now: None)
        return pb.WriteBlobResponse(sha256=bytes.fromhex(blob.sha256), size_bytes=blob.size_bytes)


class _Upload:
    """Lets a thread read what the event loop receives, one chunk at a time."""

    def __init__(self, requests: AsyncIterator[pb.WriteBlobRequest], loop: asyncio.AbstractEventLoop) -> None:
        self._requests = requests
        self._loop = loop
        self.cancelled = False

    def chunks(self) -> Iterator[bytes]:
        """Chunks until the sender has ended; raises if it went away, so that a torn file is never kept."""
        while (request := asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()) is not None:
            if len(request.chunk) > MAX_WRITE_BYTES:
                message = f"a chunk has at most {MAX_WRITE_BYTES} bytes"
                raise EbbflowError(Reason.INVALID_REQUEST, message, field="chunk")
            yield request.chunk
        if self.cancelled:
            raise EbbflowError(Reason.INVALID_REQUEST, "the sender went away")

    async def _next(self) -> pb.WriteBlobRequest | None:
        return await anext(aiter(self._requests), None)


def _digest(sha256: bytes) -> str:
    if len(sha256) != _DIGEST_BYTES:
        raise EbbflowError(Reason.INVALID_REQUEST, f"sha256 must have {_DIGEST_BYTES} bytes", field="sha256")
    return sha256.hex()


def _is_for(session: Session, agent_id: str, sha256: str) -> bool:
    """Whether a blob is a file of a published release of a student that the agent was given."""
    students = sa.select(Assignment.student_id).where(Assignment.agent_id == agent_id)
    query = sa.select(Release.targets).where(Release.student_id.in_(students), Release.state == ReleaseState.PUBLISHED)
    return any(file["sha256"] == sha256 for targets in session.scalars(query) for file in targets.values())
