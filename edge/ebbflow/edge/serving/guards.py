"""What stands before the handlers of the HTTP API."""

import hmac
import ipaddress
from typing import Annotated

from fastapi import Header
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ebbflow.common.errors import EbbflowError, Reason

MAX_BODY_BYTES = 4 * 2**20
_TOO_LARGE = 413
_MISDIRECTED = 421


class KeyGuard:
    """Refuses requests without the key, where one is configured. A dependency of FastAPI's routes."""

    def __init__(self, api_key: str | None) -> None:
        """Takes what callers must send as a bearer token; None lets everyone in who reaches the port."""
        self._api_key = api_key

    async def __call__(self, authorization: Annotated[str, Header()] = "") -> None:
        """Looks at the Authorization header.

        Raises:
            EbbflowError: API_KEY_INVALID.
        """
        if self._api_key is None:
            return
        scheme, _, key = authorization.partition(" ")
        sent = key.strip().encode("latin-1", "replace")  # headers arrive as bytes that were read as Latin-1
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent, self._api_key.encode()):
            raise EbbflowError(Reason.API_KEY_INVALID, "the API key is missing or wrong")


class BodyLimit:
    """Refuses bodies of more than 4 MiB, announced or not, before they fill the memory."""

    def __init__(self, app: ASGIApp) -> None:
        """Wraps an app."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the bytes of the body."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced) > MAX_BODY_BYTES:
            return await _refusal(_TOO_LARGE, f"the body exceeds {MAX_BODY_BYTES} bytes")(scope, receive, send)
        seen_bytes = 0

        async def counted() -> Message:
            nonlocal seen_bytes
            message = await receive()
            seen_bytes += len(message.get("body", b""))
            if seen_bytes > MAX_BODY_BYTES:
                raise HTTPException(_TOO_LARGE, f"the body exceeds {MAX_BODY_BYTES} bytes")
            return message

        return await self._app(scope, counted, send)


class LocalHosts:
    """Refuses requests under a name that is not this machine's own, as a web page would send by DNS rebinding."""

    def __init__(self, app: ASGIApp) -> None:
        """Wraps an app."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Looks at the Host header."""
        if scope["type"] == "http" and not _is_local(Headers(scope=scope).get("host", "")):
            message = "without an api_key this agent answers under a loopback name only"
            return await _refusal(_MISDIRECTED, message)(scope, receive, send)
        return await self._app(scope, receive, send)


def _is_local(host: str) -> bool:
    """Whether a Host header names no domain: only a domain can be pointed at this machine by others."""
    name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True


def _refusal(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status)
