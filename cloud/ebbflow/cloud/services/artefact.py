"""ArtefactService: bytes of releases and of the metadata that makes them trusted, in chunks."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import grpc

from ebbflow.api.v1 import artefact_pb2 as pb
from ebbflow.api.v1 import artefact_pb2_grpc
from ebbflow.cloud.blobs.base import CHUNK_BYTES, Reader
from ebbflow.cloud.release import neighbours, repository
from ebbflow.cloud.release.deltas import FORMAT, Found
from ebbflow.cloud.services import deltas
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.transfer import Transfers
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]

MAX_WRITE_BYTES = 1024 * 1024
MOST_BASES = 8
_DIGEST_BYTES = 32


class ArtefactService(artefact_pb2_grpc.ArtefactServiceServicer):
    """See artefact.proto. However large a file and however many readers: memory stays as it is."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._transfers = Transfers(cloud.files)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that has not started."""
        artefact_pb2_grpc.add_ArtefactServiceServicer_to_server(self, server)
        descriptor = pb.DESCRIPTOR.services_by_name["ArtefactService"]
        # The later registration of a method counts. This one has no serializer: the messages come serialised.
        read_blob: Any = grpc.unary_stream_rpc_method_handler(
            self.ReadBlob, request_deserializer=pb.ReadBlobRequest.FromString
        )
        server.add_registered_method_handlers(descriptor.full_name, {"ReadBlob": read_blob})

    async def ReadMetadata(
        self, request: pb.ReadMetadataRequest, context: Context
    ) -> AsyncIterator[pb.ReadMetadataResponse]:
        """Streams one file of trust metadata."""
        content = await self._cloud.read(lambda session: repository.read_metadata(session, request.file_name))
        for begin in range(0, len(content), CHUNK_BYTES):
            yield pb.ReadMetadataResponse(chunk=content[begin : begin + CHUNK_BYTES])

    async def ReadBlob(self, request: pb.ReadBlobRequest, context: Context) -> AsyncIterator[Any]:
        """Streams a blob from an offset as serialised messages.

        An agent gets files of releases of its own students, a viewer those of all; other files are for operators.
        Whoever may read is asked once, at the start.
        """
        cloud, sha256, who = self._cloud, _digest(request.sha256), current().caller.identity
        agent_id = who.id if who.kind == "agent" else None
        everything = agent_id is None and who.allows("operator")
        if not everything and not await cloud.read(lambda session: neighbours.may_read(session, agent_id, sha256)):
            raise EbbflowError(Reason.BLOB_NOT_FOUND, f"no blob {sha256}", sha256=sha256)
        reader = await cloud.in_thread(cloud.files, lambda: self._open(sha256, request.offset_bytes))
        async with aclosing(self._transfers.stream(reader, request.max_chunk_bytes)) as messages:
            async for message in messages:
                yield message

    def _open(self, sha256: str, offset_bytes: int) -> Reader:
        blobs = self._cloud.blobs
        size_bytes = blobs.size(sha256)
        if offset_bytes > size_bytes:
            message = f"offset_bytes is beyond the blob's {size_bytes} bytes"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="offset_bytes")
        return blobs.reader(sha256, offset_bytes)

    async def FindDeltas(self, request: pb.FindDeltasRequest, context: Context) -> pb.FindDeltasResponse:
        """Returns the deltas that are ready while the caller has time; an agent gets those of its own students."""
        cloud, target, peer = self._cloud, _digest(request.target_sha256), current().caller
        bases = [_digest(base) for base in request.base_sha256]
        if len(bases) > MOST_BASES:
            message = f"base_sha256 has at most {MOST_BASES} entries"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="base_sha256")
        agent_id = peer.identity.id if peer.identity.kind == "agent" else None
        files = await cloud.read(lambda session: neighbours.shelf(session, agent_id))
        built = await deltas.wait_for(cloud, neighbours.pairs_to(files, target, bases), deltas.time_left_s(context))
        return pb.FindDeltasResponse(deltas=map(_offer, deltas.useful(built)))

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
        call.resource = "" if upload.private else f"blobs/{blob.sha256}"
        await cloud.change(lambda _session, _now: None)
        return pb.WriteBlobResponse(sha256=bytes.fromhex(blob.sha256), size_bytes=blob.size_bytes)


class _Upload:
    """Lets a thread read what the event loop receives, one chunk at a time."""

    def __init__(self, requests: AsyncIterator[pb.WriteBlobRequest], loop: asyncio.AbstractEventLoop) -> None:
        self._requests = requests
        self._loop = loop
        self.cancelled = False
        self.private = False
        self._announced_bytes = 0

    def chunks(self) -> Iterator[bytes]:
        """Chunks until the sender has ended; raises if it went away, so that a torn file is never kept."""
        size_bytes = 0
        while (request := asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()) is not None:
            if len(request.chunk) > MAX_WRITE_BYTES:
                message = f"a chunk has at most {MAX_WRITE_BYTES} bytes"
                raise EbbflowError(Reason.INVALID_REQUEST, message, field="chunk")
            self.private |= request.private
            self._announced_bytes = self._announced_bytes or request.size_bytes
            size_bytes += len(request.chunk)
            yield request.chunk
        # gRPC may tell of the end before it tells that the end was a cancellation.
        if self.cancelled or self._announced_bytes not in {0, size_bytes}:
            message = f"the sender went away after {size_bytes} of {self._announced_bytes or 'its'} bytes"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="size_bytes")

    async def _next(self) -> pb.WriteBlobRequest | None:
        return await anext(aiter(self._requests), None)


def _digest(sha256: bytes) -> str:
    if len(sha256) != _DIGEST_BYTES:
        raise EbbflowError(Reason.INVALID_REQUEST, f"sha256 must have {_DIGEST_BYTES} bytes", field="sha256")
    return sha256.hex()


def _offer(found: Found) -> pb.Delta:
    return pb.Delta(
        base_sha256=bytes.fromhex(found.pair.base_sha256),
        sha256=bytes.fromhex(found.sha256 or ""),
        size_bytes=found.size_bytes,
        format=FORMAT,
    )
