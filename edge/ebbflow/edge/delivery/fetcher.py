"""Reads metadata and blobs from the cloud, and lets The Update Framework read through it."""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import grpc
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError
from tuf.ngclient import FetcherInterface

from ebbflow.api.v1 import artefact_pb2, artefact_pb2_grpc
from ebbflow.common.errors import Code, EbbflowError, Reason
from ebbflow.common.rpc.errors import from_rpc_error
from ebbflow.edge.delivery.files import SignedFile
from ebbflow.edge.delivery.frames import Chunk, chunk_of
from ebbflow.edge.delivery.plan import Offer
from ebbflow.edge.delivery.watchdog import Watchdog

METADATA_URL = "ebbflow:///metadata/"
TARGETS_URL = "ebbflow:///targets/"

_DIGEST_BYTES = 32
_READ_BLOB = "/ebbflow.api.v1.ArtefactService/ReadBlob"
_LIFE_S = 7 * 86_400.0
"""Deadline of one call. Silence ends a call long before; this only keeps it from outliving the connection's peers."""


class ArtefactSource:
    """Reads from the cloud's ArtefactService. Thread-safe.

    A call fails when the server falls silent, never because the whole takes long.
    """

    def __init__(self, channel: grpc.Channel, silence_s: float = 30.0) -> None:
        """Takes a synchronous channel to the mutually authenticated listener.

        Args:
            channel: the channel; stays the caller's to close.
            silence_s: how long the server may be silent before a call is given up.
        """
        self._silence_s = silence_s
        self._lock = threading.Lock()
        self.use(channel)

    def use(self, channel: grpc.Channel) -> None:
        """Changes to another channel, for example after the certificate was renewed; running calls end on the old."""
        stub: Any = artefact_pb2_grpc.ArtefactServiceStub(channel)
        stub.ReadBlob = channel.unary_stream(_READ_BLOB, artefact_pb2.ReadBlobRequest.SerializeToString, chunk_of)
        with self._lock:
            self._stub = stub

    def metadata(self, file_name: str) -> Generator[bytes, None, None]:
        """Yields the bytes of one metadata file.

        Raises:
            EbbflowError: METADATA_NOT_FOUND, SERVER_UNAVAILABLE, DEADLINE_EXCEEDED when the server falls silent.
        """
        request = artefact_pb2.ReadMetadataRequest(file_name=file_name)
        return self._chunks(lambda stub: stub.ReadMetadata(request, timeout=_LIFE_S))

    def blob(self, sha256: str, offset_bytes: int = 0, max_chunk_bytes: int = 0) -> Generator[Chunk, None, None]:
        """Yields the bytes of a blob from an offset. They are not verified.

        Args:
            sha256: name of the blob, hexadecimal.
            offset_bytes: first byte to read.
            max_chunk_bytes: longest chunk to ask for; 0 leaves it to the server.

        Raises:
            EbbflowError: BLOB_NOT_FOUND, SERVER_UNAVAILABLE, DEADLINE_EXCEEDED when the server falls silent.
        """
        request = artefact_pb2.ReadBlobRequest(
            sha256=bytes.fromhex(sha256), offset_bytes=offset_bytes, max_chunk_bytes=max_chunk_bytes
        )
        return self._chunks(lambda stub: stub.ReadBlob(request, timeout=_LIFE_S))

    def deltas(self, target_sha256: str, base_sha256s: Sequence[str], timeout_s: float) -> list[Offer]:
        """Asks what leads from files that the device has to one that it wants. Nothing in the answer is verified.

        Args:
            target_sha256: the wanted file, hexadecimal.
            base_sha256s: the files to begin from, 8 at most.
            timeout_s: how long the cloud may take, which builds what is not built yet.

        Raises:
            EbbflowError: why there is no answer.
        """
        request = artefact_pb2.FindDeltasRequest(
            target_sha256=bytes.fromhex(target_sha256), base_sha256=[bytes.fromhex(base) for base in base_sha256s]
        )
        with self._lock:
            stub = self._stub
        try:
            answer = stub.FindDeltas(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return [
            Offer(delta.base_sha256.hex(), SignedFile(delta.sha256.hex(), delta.size_bytes), delta.format)
            for delta in answer.deltas
            if len(delta.sha256) == _DIGEST_BYTES
        ]

    def _chunks(self, call: Any) -> Generator[Any, None, None]:
        with self._lock:
            stub = self._stub
        answers = call(stub)
        with Watchdog(answers.cancel, self._silence_s) as watchdog:
            try:
                while True:
                    watchdog.wait()
                    answer = next(answers, None)
                    if answer is None:
                        return
                    chunk = answer if isinstance(answer, Chunk) else answer.chunk
                    watchdog.feed(len(chunk))
                    yield chunk
            except (grpc.RpcError, EbbflowError) as error:
                if watchdog.barked:
                    message = f"the server sent nothing for {self._silence_s:g} s"
                    raise EbbflowError(Reason.DEADLINE_EXCEEDED, message) from error
                if isinstance(error, EbbflowError):
                    raise
                raise _named(error) from error
            finally:
                answers.cancel()


class ArtefactFetcher(FetcherInterface):
    """What python-tuf's `Updater` reads through.

    `_fetch` must not be a generator itself: python-tuf guards only the call, and a generator's body runs after it.
    Hence the first read happens at once, and errors are mapped both there and on the way.
    """

    def __init__(self, source: ArtefactSource) -> None:
        self._source = source

    def _fetch(self, url: str) -> Iterator[bytes]:
        if url.startswith(METADATA_URL):
            chunks: Generator[Any, None, None] = self._source.metadata(urlsplit(url).path.rpartition("/")[2])
        else:  # student/faq/<sha256>.3.int8.safetensors: consistent snapshots put the hash before the name
            chunks = self._source.blob(urlsplit(url).path.rpartition("/")[2].partition(".")[0])
        try:
            first = next(chunks, b"")
        except EbbflowError as error:
            raise _download_error(error) from error
        return _rest(first, chunks)


def _rest(first: bytes, chunks: Generator[bytes, None, None]) -> Iterator[bytes]:
    yield first
    with closing(chunks):
        try:
            yield from chunks
        except EbbflowError as error:
            raise _download_error(error) from error


def _download_error(error: EbbflowError) -> DownloadError:
    """Says it in python-tuf's words; 404 is how it learns that there is no newer root."""
    if error.code is Code.NOT_FOUND:
        return DownloadHTTPError(str(error), 404)
    if error.reason is Reason.DEADLINE_EXCEEDED:
        return SlowRetrievalError(str(error))
    return DownloadError(str(error))


def _named(error: grpc.RpcError) -> EbbflowError:
    code = getattr(error, "code", None)
    if callable(code) and code() is grpc.StatusCode.NOT_FOUND:
        named = from_rpc_error(error)
        return named if named.code is Code.NOT_FOUND else EbbflowError(Reason.BLOB_NOT_FOUND, str(named))
    return from_rpc_error(error)
