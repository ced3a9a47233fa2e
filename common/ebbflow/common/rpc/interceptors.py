"""The server interceptor that turns every error into a status and lets no other text out."""

from __future__ import annotations  # gRPC's classes are generic for the type checker only

import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.rpc.errors import to_status

_log = logging.getLogger(__name__)
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")

Handler = Callable[[Any, Any], Any]
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Sends an `EbbflowError` as its status with `ErrorInfo`, and anything else as INTERNAL without its text.

    Must be the first interceptor of a server, so that it also answers for the others. The log gets the type and the
    place of an unknown error, never its text, which may hold what a user wrote.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of a call, of whichever of the four kinds it is."""
        try:
            handler = await continuation(handler_call_details)
        except EbbflowError as error:
            return _refusal(error)
        if handler is None:
            return handler  # unknown method: gRPC answers UNIMPLEMENTED
        method = str(handler_call_details.method)
        kind = next(kind for kind in _KINDS if getattr(handler, kind))
        wrap = _guard_stream if handler.response_streaming else _guard_unary
        wrapped: grpc.RpcMethodHandler[Any, Any] = handler._replace(  # type: ignore[attr-defined]
            **{kind: wrap(getattr(handler, kind), method)}
        )
        return wrapped


def _guard_unary(handler: Handler, method: str) -> Handler:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await handler(request, context)
        except Exception as error:  # noqa: BLE001 - the last line of defence; cancellation is no Exception
            await _refuse(error, context, method)

    return guarded


def _guard_stream(handler: Handler, method: str) -> Handler:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            answers = handler(request, context)
            if not hasattr(answers, "__aiter__"):
                await answers  # a handler that calls context.write
                return
            async with aclosing(answers):
                async for answer in answers:
                    yield answer
        except Exception as error:  # noqa: BLE001 - the last line of defence; cancellation is no Exception
            await _refuse(error, context, method)

    return guarded


async def _refuse(error: Exception, context: Context, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error  # the handler has chosen a status itself
    if isinstance(error, NotImplementedError) and context.code() is grpc.StatusCode.UNIMPLEMENTED:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")  # the generated base class
    if not isinstance(error, EbbflowError):
        frames = "".join(traceback.format_tb(error.__traceback__))
        _log.error("unhandled %s in %s\n%s", type(error).__name__, method, frames)
        error = EbbflowError(Reason.INTERNAL, "internal error")
    await context.abort_with_status(to_status(error))


def _refusal(error: EbbflowError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: Any, context: Context) -> None:
        await context.abort_with_status(to_status(error))

    return grpc.unary_unary_rpc_method_handler(refuse)
