"""The admin's client: one typed stub for each service, and what makes them pleasant."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ebbflow.api.v1.artefact_pb2 import WriteBlobRequest, WriteBlobResponse
from ebbflow.api.v1.artefact_pb2_grpc import ArtefactServiceStub
from ebbflow.api.v1.distillation_pb2_grpc import DistillationServiceStub
from ebbflow.api.v1.fleet_pb2_grpc import FleetServiceStub
from ebbflow.api.v1.ledger_pb2_grpc import LedgerServiceStub
from ebbflow.api.v1.population_pb2_grpc import PopulationServiceStub
from ebbflow.api.v1.release_pb2_grpc import ReleaseServiceStub
from ebbflow.api.v1.rollout_pb2_grpc import RolloutServiceStub
from ebbflow.api.v1.round_pb2_grpc import RoundServiceStub
from ebbflow.api.v1.student_pb2_grpc import StudentServiceStub
from ebbflow.api.v1.trust_pb2_grpc import TrustServiceStub
from ebbflow.client.channels import sync_channel
from ebbflow.client.context import AdminContext
from ebbflow.client.endpoint import Endpoint
from ebbflow.common.errors import EbbflowError, Reason

CHUNK_BYTES = 512 * 1024
MAX_PAGE = 1000
_UPLOAD_WAITS_S = (0.2, 0.5, 1.0)
"""Before each further try of an upload whose line broke."""


class AdminClient:
    """Speaks with the cloud as an admin. Every failure is an `EbbflowError`.

    Attributes:
        students: students.
        distillations: distillations.
        releases: releases.
        rollouts: rollouts.
        fleet: agents, enrolment tokens and admins.
        rounds: rounds.
        populations: prompts that users vote on.
        ledger: privacy accounts and the audit log.
        artefacts: blobs.
        trust: the signed metadata.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        """Prepares a channel; nothing is sent before the first call."""
        self._channel = channel = sync_channel(endpoint)
        self.students = StudentServiceStub(channel)
        self.distillations = DistillationServiceStub(channel)
        self.releases = ReleaseServiceStub(channel)
        self.rollouts = RolloutServiceStub(channel)
        self.fleet = FleetServiceStub(channel)
        self.rounds = RoundServiceStub(channel)
        self.populations = PopulationServiceStub(channel)
        self.ledger = LedgerServiceStub(channel)
        self.artefacts = ArtefactServiceStub(channel)
        self.trust = TrustServiceStub(channel)

    @classmethod
    def from_context(cls, path: Path) -> "AdminClient":
        """Reads a context file.

        Raises:
            EbbflowError: NOT_INITIALISED, CONFIG_INVALID or CERTIFICATE_EXPIRED.
        """
        return cls(AdminContext.load(path).endpoint())

    def upload(self, path: Path, *, private: bool = False) -> WriteBlobResponse:
        """Stores a file as a blob, in chunks; from the start again where the line breaks.

        Args:
            path: the file.
            private: keeps its hash out of the audit log.

        Raises:
            EbbflowError: CONFIG_INVALID if the file cannot be read, or the server's.
        """
        for wait_s in _UPLOAD_WAITS_S:
            try:
                return self._upload(path, private)
            except EbbflowError as error:
                if error.reason is not Reason.SERVER_UNAVAILABLE:
                    raise
            time.sleep(wait_s)
        return self._upload(path, private)

    def _upload(self, path: Path, private: bool) -> WriteBlobResponse:
        try:
            file = path.open("rb")  # a file of its own: gRPC's thread may still read the one of a broken call
        except OSError as error:
            raise EbbflowError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}", path=path) from error
        with file:
            return self.artefacts.WriteBlob(_chunks(file, private))

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def __enter__(self) -> "AdminClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def listed(method: Callable[[Any], Any], request: Any, field: str, limit: int = 0) -> Iterator[Any]:
    """Yields the items of a paged list, fetching pages as they are needed.

    Args:
        method: a List method of a stub.
        request: its request; `page_size` and `page_token` are set here.
        field: name of the repeated field in the answer.
        limit: most items; 0 means all.
    """
    left = limit or None
    while True:
        request.page_size = MAX_PAGE if left is None else min(left, MAX_PAGE)
        answer = method(request)
        items = getattr(answer, field)
        yield from items if left is None else items[:left]
        left = left if left is None else left - len(items)
        if not answer.next_page_token or (left is not None and left <= 0):
            return
        request.page_token = answer.next_page_token


def _chunks(file: BinaryIO, private: bool) -> Iterator[WriteBlobRequest]:
    size_bytes = os.fstat(file.fileno()).st_size
    while chunk := file.read(CHUNK_BYTES):
        yield WriteBlobRequest(chunk=chunk, private=private, size_bytes=size_bytes)
