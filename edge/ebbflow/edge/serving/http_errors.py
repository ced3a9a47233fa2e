"""Errors in the shape that OpenAI's clients know: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ebbflow.common.errors import Code, EbbflowError, Reason
from ebbflow.edge.serving.faults import place_of

log = structlog.get_logger(__name__)

_STATUS = {
    Code.INVALID_ARGUMENT: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
_INTERNAL = 500
_TYPES = {429: "rate_limit_error"}
# OpenAI's own words where it has one; elsewhere the catalogue's, in lower case.
_CODES = {Reason.CONTEXT_TOO_LONG: "context_length_exceeded", Reason.API_KEY_INVALID: "invalid_api_key"}


def status_of(error: EbbflowError) -> int:
    """Returns the HTTP status of an error."""
    return _STATUS.get(error.code, _INTERNAL)


def body_of(error: EbbflowError) -> dict[str, object]:
    """Returns the JSON body of an error; the message ends with the cure."""
    code = _CODES.get(error.reason, error.reason.name.lower())
    return _body(status_of(error), f"{error}. {error.cure}", error.metadata.get("field"), code)


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of an app leave it in OpenAI's shape, and none with an unexpected exception's text."""

    async def known(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, EbbflowError)  # noqa: S101 - FastAPI's types are wider than its promise
        wait_s = error.metadata.get("retry_after_s")
        headers = {"Retry-After": wait_s} if wait_s else None
        return JSONResponse(body_of(error), status_of(error), headers)

    async def malformed(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
        first = error.errors()[0]
        field = next((str(part) for part in first["loc"] if part != "body"), None)
        return _response(400, f"{field or 'body'}: {first['msg']}", field, "invalid_request")

    async def http(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - as above
        return _response(error.status_code, str(error.detail), None, None, error.headers)

    async def unexpected(_request: Request, error: Exception) -> JSONResponse:
        log.error("request_failed", **place_of(error))
        return _response(_INTERNAL, "internal error", None, "internal")

    app.add_exception_handler(EbbflowError, known)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _response(
    status: int, message: str, param: str | None, code: str | None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(_body(status, message, param, code), status, headers)


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, object]:
    kind = _TYPES.get(status, "invalid_request_error" if status < _INTERNAL else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
