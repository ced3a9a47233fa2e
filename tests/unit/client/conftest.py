"""A real server with real certificates on a real socket, whose handlers each test writes."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from ebbflow.api.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    artefact_pb2,
    artefact_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
)
from ebbflow.client.endpoint import Endpoint
from ebbflow.cloud.identity.authority import Authority
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr
from ebbflow.common.identity.peers import Peer
from ebbflow.common.rpc.server import bind, make_server


@dataclass
class Live:
    """A running server."""

    address: str
    authority: Authority
    seen: list[Any] = field(default_factory=list)
    """What handlers have noted."""
    fail: Callable[[Any], None] = lambda context: None
    """Called first by every handler; raises what the test wants."""

    def endpoint(self, admin_id: str = "ada", authority: Authority | None = None) -> Endpoint:
        """An endpoint with a certificate of its own, by another authority if wanted."""
        key = generate_key()
        issued = (authority or self.authority).issue_admin(make_csr(key), admin_id, "owner")
        return Endpoint(self.address, self.authority.certificate_pem, issued.certificate_pem, key_to_pem(key))


class Fleet(fleet_pb2_grpc.FleetServiceServicer):
    """Unary calls."""

    def __init__(self, live: Live) -> None:
        self.live = live

    async def GetAgent(self, request: Any, context: Any) -> fleet_pb2.GetAgentResponse:  # noqa: N802
        self.live.seen.append((Peer.from_auth_context(context.auth_context()).identity.name, context.time_remaining()))
        self.live.fail(context)
        return fleet_pb2.GetAgentResponse(agent=fleet_pb2.Agent(name=request.name))

    async def ListAgents(self, request: Any, context: Any) -> fleet_pb2.ListAgentsResponse:  # noqa: N802
        self.live.seen.append(request.page_size)
        start, size = int(request.page_token or 0), min(request.page_size or 50, 1000)
        names = [f"agents/a{number}" for number in range(start, min(start + size, 2500))]
        token = str(start + size) if start + size < 2500 else ""
        return fleet_pb2.ListAgentsResponse(agents=[fleet_pb2.Agent(name=n) for n in names], next_page_token=token)


class Artefacts(artefact_pb2_grpc.ArtefactServiceServicer):
    """Streams one way."""

    def __init__(self, live: Live) -> None:
        self.live = live

    async def ReadBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.live.seen.append(context.time_remaining())
        yield artefact_pb2.ReadBlobResponse(chunk=b"first")
        self.live.fail(context)

    async def WriteBlob(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        self.live.seen.append(context.time_remaining())
        size = 0
        async for request in request_iterator:
            size += len(request.chunk)
            self.live.fail(context)
        return artefact_pb2.WriteBlobResponse(size_bytes=size)


class Line(agent_pb2_grpc.AgentServiceServicer):
    """Streams both ways."""

    def __init__(self, live: Live) -> None:
        self.live = live

    async def Connect(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.live.seen.append(context.time_remaining())
        async for _ in request_iterator:
            yield agent_pb2.ConnectResponse(hint=agent_pb2.Hint())
            self.live.fail(context)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A server that asks for client certificates, on a loop of its own so that synchronous clients can be tried."""
    authority = Authority.create(tmp_path / "authority")
    state = Live("", authority)
    ready, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        key, chain = authority.issue_server(["localhost", "127.0.0.1"])
        credentials = grpc.ssl_server_credentials([(key, chain)], authority.certificate_pem, True)
        server = make_server()
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(Fleet(state), server)  # type: ignore[abstract]
        artefact_pb2_grpc.add_ArtefactServiceServicer_to_server(Artefacts(state), server)  # type: ignore[abstract]
        agent_pb2_grpc.add_AgentServiceServicer_to_server(Line(state), server)  # type: ignore[abstract]
        state.address = f"127.0.0.1:{bind(server, '127.0.0.1:0', credentials)}"
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop(0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    yield state
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()
