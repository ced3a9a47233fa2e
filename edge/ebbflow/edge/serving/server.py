"""The HTTP server: uvicorn on the agent's own event loop."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from ebbflow.common.errors import EbbflowError, Reason

_BACKLOG = 128


class _Server(uvicorn.Server):
    """Leaves the signals to the agent."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """One listening socket and what answers on it.

    Attributes:
        address: host:port as it is, also where port 0 was asked for.
    """

    def __init__(self, app: ASGIApp, listen: str, grace_s: float) -> None:
        """Opens the port; nothing is answered before `start`.

        Args:
            app: what answers.
            listen: host:port; port 0 takes a free one.
            grace_s: how long running requests may take to finish when the server stops.

        Raises:
            EbbflowError: PORT_IN_USE, or CONFIG_INVALID if the address is not one of this machine's.
        """
        self._socket = _open(listen)
        host, port = self._socket.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(grace_s)),
            timeout_keep_alive=30,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to answer."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)

    async def stop(self, grace_s: float | None = None) -> None:
        """Takes nothing new, lets running requests finish, and closes the port.

        Args:
            grace_s: how long they may take; None for the grace of `__init__`.
        """
        if grace_s is not None:
            self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        if self._task:
            await self._task
        self._socket.close()


def _open(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, target = found[0]
    except (OSError, ValueError, OverflowError) as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{listen!r} is no host:port to listen on", address=listen) from error
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(target)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise EbbflowError(Reason.PORT_IN_USE, f"another process listens on {listen}", address=listen) from error
        raise EbbflowError(Reason.CONFIG_INVALID, f"cannot listen on {listen}", address=listen) from error
    opened.setblocking(False)
    return opened


def is_loopback(listen: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
