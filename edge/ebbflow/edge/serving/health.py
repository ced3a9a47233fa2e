"""Health for supervisors, balancers and Prometheus: /healthz, /readyz and /metrics; and an orderly end of serving."""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.guards import KeyGuard
from ebbflow.edge.serving.http_errors import body_of, status_of
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.metrics import Metrics

_UNAVAILABLE = 503
_NEVER_STORED = {"Cache-Control": "no-store"}


class Health:
    """Whether this agent lives and may be sent requests. Belongs to one event loop.

    Attributes:
        draining: nothing new is taken on.
    """

    def __init__(self, hub: Hub) -> None:
        """Asks the students on this device."""
        self._hub = hub
        self.draining = False
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def ill(self) -> str:
        """Returns what only a restart cures, as a word; empty if there is nothing."""
        return "" if self._hub.alive() else "engine_thread_ended"

    def unready(self) -> str:
        """Returns why requests should go elsewhere, as a word; empty if they are answered here."""
        if self.draining:
            return "draining"
        return self.ill() or ("" if self._hub.models() else "no_release")

    def drain(self) -> None:
        """From now on requests are refused; those under way run on, and health is still told."""
        self.draining = True

    async def idle(self) -> None:
        """Waits until no request is under way."""
        await self._idle.wait()

    async def counted(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does work that a drain waits for."""
        self._under_way += 1
        self._idle.clear()
        try:
            await work()
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()


class DrainGuard:
    """Counts what is under way under /v1, and refuses what comes once the agent drains."""

    def __init__(self, app: ASGIApp, health: Health) -> None:
        """Wraps an app."""
        self._app, self._health = app, health

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets requests through until the agent drains."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        if self._health.draining:
            error = EbbflowError(Reason.AGENT_STOPPING, "the agent is stopping")
            refusal = JSONResponse(body_of(error), status_of(error), {"Connection": "close"})
            return await refusal(scope, receive, send)
        return await self._health.counted(lambda: self._app(scope, receive, send))


def add_health(app: FastAPI, health: Health, metrics: Metrics, api_key: str | None) -> None:
    """Adds /healthz, /readyz and /metrics to the HTTP API, and lets it end in order.

    Args:
        app: the API.
        health: how the agent is: one word, for probes that have no key.
        metrics: its figures.
        api_key: what callers must send to see the figures, which tell how much the device is used; None lets everyone
            see them who reaches the port.
    """

    async def healthz() -> Response:
        return _told(health.ill(), "ok")

    async def readyz() -> Response:
        return _told(health.unready(), "ready")

    async def figures(request: Request) -> Response:
        content, media_type = await asyncio.to_thread(metrics.exposition, request.headers.get("accept", ""))
        return Response(content, headers={**_NEVER_STORED, "Content-Type": media_type})

    routes = APIRouter(include_in_schema=False)
    routes.add_api_route("/healthz", healthz, methods=["GET", "HEAD"])
    routes.add_api_route("/readyz", readyz, methods=["GET", "HEAD"])
    routes.add_api_route("/metrics", figures, methods=["GET"], dependencies=[Depends(KeyGuard(api_key))])
    app.include_router(routes)
    app.add_middleware(DrainGuard, health=health)


def _told(problem: str, well: str) -> Response:
    status = {"status": "unavailable", "reason": problem} if problem else {"status": well}
    return JSONResponse(status, _UNAVAILABLE if problem else 200, _NEVER_STORED)
