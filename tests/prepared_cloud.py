"""A control plane that answers with prepared messages: a real server and certificates, no fleet behind it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from ebbflow.api.v1 import (
    distillation_pb2_grpc,
    fleet_pb2_grpc,
    release_pb2_grpc,
    rollout_pb2_grpc,
    student_pb2_grpc,
)
from ebbflow.cloud.identity.authority import Authority

MODULES = {
    "Distillation": distillation_pb2_grpc,
    "Fleet": fleet_pb2_grpc,
    "Release": release_pb2_grpc,
    "Rollout": rollout_pb2_grpc,
    "Student": student_pb2_grpc,
}


class PreparedCloud:
    """Answers each method with what was prepared for it, and keeps what it was asked.

    An answer is a message, a list of messages for a stream or for calls that follow each other, or a function of the
    request.
    """

    def __init__(self, authority: Authority) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        for name, module in MODULES.items():
            base = getattr(module, f"{name}ServiceServicer")
            methods = {method: self._handler(method) for method in vars(base) if not method.startswith("_")}
            servicer = type("Prepared", (base,), methods)()
            getattr(module, f"add_{name}ServiceServicer_to_server")(servicer, self._server)
        pair = authority.issue_server(["127.0.0.1"])
        credentials = grpc.ssl_server_credentials([pair], authority.certificate_pem, require_client_auth=True)
        self.address = f"127.0.0.1:{self._server.add_secure_port('127.0.0.1:0', credentials)}"

    def __enter__(self) -> "PreparedCloud":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(10)

    def _handler(self, method: str) -> Callable[..., Any]:
        def answer(_self: object, request: Any, _context: grpc.ServicerContext) -> Any:
            self.asked.append(request)
            prepared = self.answers[method]
            if callable(prepared):
                return prepared(request)
            if not isinstance(prepared, list):
                return prepared
            return prepared.pop(0) if len(prepared) > 1 else prepared[0]

        def stream(_self: object, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self.asked.append(request)
            parts = self.answers[method]
            while parts:
                if (part := parts.pop(0)) is None:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "this replica ends")
                yield part

        return stream if method.startswith("Watch") else answer
