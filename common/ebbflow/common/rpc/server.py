"""Binding, health, reflection and the orderly end of a gRPC server."""

import asyncio
import errno
import signal
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.rpc.interceptors import ErrorInterceptor
from ebbflow.common.rpc.options import ServerOptions

_MAX_PORT = 65_535


def make_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (), options: ServerOptions | None = None
) -> grpc.aio.Server:
    """Makes a server whose errors leak nothing; `interceptors` run inside the error interceptor."""
    return grpc.aio.server(
        interceptors=[ErrorInterceptor(), *interceptors], options=(options or ServerOptions()).pairs()
    )


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Opens a port, without TLS if there are no credentials; port 0 takes a free one.

    Returns:
        The port.

    Raises:
        EbbflowError: PORT_IN_USE, or CONFIG_INVALID if the address is not one of this machine's.
    """
    _, separator, number = address.rpartition(":")
    if not separator or not number.isdecimal() or int(number) > _MAX_PORT:
        # gRPC would quietly take another port.
        raise EbbflowError(Reason.CONFIG_INVALID, f"{address!r} is not of the form host:port", address=address)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _why_not(address) from error
    if port == 0:
        raise _why_not(address)
    return port


def add_health_and_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> Any:
    """Registers both standard services; every service, and the server as a whole (""), is serving.

    Args:
        server: a server that has not started.
        service_names: full names, such as "ebbflow.api.v1.FleetService".

    Returns:
        The health servicer (`grpc_health.v1.health.aio.HealthServicer`), for `serve_until`.
    """
    names = list(service_names)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in ["", health.SERVICE_NAME, *names]:
        # `set` only stores the value; awaiting it needs a loop, which a server that is being built may not have yet.
        servicer._server_status[name] = health_pb2.HealthCheckResponse.SERVING
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return servicer


def stop_on_signals() -> asyncio.Event:
    """Returns an event that SIGTERM or SIGINT sets. Needs the running loop of the main thread."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def serve_until(
    stop: asyncio.Event, servers: Sequence[grpc.aio.Server], health_servicers: Iterable[Any] = (), grace_s: float = 10.0
) -> None:
    """Starts servers, waits for `stop` and drains them.

    Health says NOT_SERVING first; then no call is taken any more and the running ones have `grace_s` to end. Handlers
    of endless streams should watch `stop` themselves, else they use the grace up.
    """
    for server in servers:
        await server.start()
    try:
        await stop.wait()
    finally:
        for servicer in health_servicers:
            await servicer.enter_graceful_shutdown()
        await asyncio.gather(*(server.stop(grace_s) for server in servers))


def _why_not(address: str) -> EbbflowError:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(target)
    except OSError as error:
        if error.errno == errno.EACCES:
            return EbbflowError(Reason.CONFIG_INVALID, f"not allowed to listen on {address}", address=address)
        if error.errno != errno.EADDRINUSE:
            return EbbflowError(Reason.CONFIG_INVALID, f"{address} is no address of this machine", address=address)
    return EbbflowError(Reason.PORT_IN_USE, f"another process listens on {address}", address=address)
