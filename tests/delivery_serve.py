"""Serves the blobs of a folder over TLS, slowly, until it is killed. Run by test_links.py.

Arguments: the folder of a `World`, the folder of its blobs, a port, seconds to wait before each piece.
"""

import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from ebbflow.api.v1 import artefact_pb2
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.identity.authority import Authority

PIECE_BYTES = 1 << 14


class Blobs:
    """The one method that counts here."""

    def __init__(self, blobs: LocalBlobStore, wait_s: float) -> None:
        self._blobs, self._wait_s = blobs, wait_s

    def ReadBlob(self, request: Any, _: Any) -> Iterator[Any]:  # noqa: N802
        for chunk in self._blobs.open(request.sha256.hex(), request.offset_bytes):
            for begin in range(0, len(chunk), PIECE_BYTES):
                time.sleep(self._wait_s)
                yield artefact_pb2.ReadBlobResponse(chunk=chunk[begin : begin + PIECE_BYTES])


def main() -> None:
    """Serves."""
    folder, blobs, port, wait_s = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    authority = Authority.load(folder / "authority")
    key_pem, chain_pem = authority.issue_server(["localhost"])
    credentials = grpc.ssl_server_credentials(
        [(key_pem, chain_pem)], root_certificates=authority.certificate_pem, require_client_auth=True
    )
    server = grpc.server(futures.ThreadPoolExecutor(4))
    read_blob = grpc.unary_stream_rpc_method_handler(
        Blobs(LocalBlobStore(blobs), wait_s).ReadBlob,
        request_deserializer=artefact_pb2.ReadBlobRequest.FromString,
        response_serializer=artefact_pb2.ReadBlobResponse.SerializeToString,
    )
    service = artefact_pb2.DESCRIPTOR.services_by_name["ArtefactService"].full_name
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"ReadBlob": read_blob})])
    server.add_secure_port(f"localhost:{port}", credentials)
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
