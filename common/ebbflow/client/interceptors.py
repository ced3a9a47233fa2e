"""Client interceptors: a deadline on every call, and every failure as an `EbbflowError`.

An aio channel takes each interceptor object for one kind of call only, and silently so; hence one class for each kind.
"""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from ebbflow.common.rpc.errors import from_rpc_error

Continuation = Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long calls may take when the caller does not say, by kind."""

    unary_s: float = 10.0
    """One message there, one back."""
    upload_s: float = 3600.0
    """A stream up."""
    download_s: float = 3600.0
    """A stream down."""
    line_s: float = 86_400.0
    """Streams both ways: the agents' control line opens anew once a day at least."""


@dataclass(frozen=True)
class _Calls:
    """What the interceptors of all kinds know."""

    address: str
    timeout_s: float

    def dated(self, details: Any) -> Any:
        return (
            details._replace(timeout=details.timeout) if details.timeout else details._replace(timeout=self.timeout_s)
        )

    async def mapped(self, answers: AsyncIterable[Any]) -> AsyncIterator[Any]:
        try:
            async for answer in answers:
                yield answer
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error


class UnaryUnaryCalls(_Calls, grpc.aio.UnaryUnaryClientInterceptor):
    """For calls with one message each way."""

    async def intercept_unary_unary(self, continuation: Continuation, client_call_details: Any, request: Any) -> Any:
        """Sets the deadline and maps the error."""
        try:
            call = await continuation(self.dated(client_call_details), request)
            await call
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error
        return call


class UnaryStreamCalls(_Calls, grpc.aio.UnaryStreamClientInterceptor):
    """For streams down."""

    async def intercept_unary_stream(self, continuation: Continuation, client_call_details: Any, request: Any) -> Any:
        """Sets the deadline and maps the error."""
        return self.mapped(await continuation(self.dated(client_call_details), request))


class StreamUnaryCalls(_Calls, grpc.aio.StreamUnaryClientInterceptor):
    """For streams up."""

    async def intercept_stream_unary(
        self, continuation: Continuation, client_call_details: Any, request_iterator: Any
    ) -> Any:
        """Sets the deadline and maps the error."""
        try:
            call = await continuation(self.dated(client_call_details), request_iterator)
            await call
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error
        return call


class StreamStreamCalls(_Calls, grpc.aio.StreamStreamClientInterceptor):
    """For streams both ways."""

    async def intercept_stream_stream(
        self, continuation: Continuation, client_call_details: Any, request_iterator: Any
    ) -> Any:
        """Sets the deadline and maps the error."""
        return self.mapped(await continuation(self.dated(client_call_details), request_iterator))


def aio_interceptors(address: str, deadlines: Deadlines) -> list[grpc.aio.ClientInterceptor]:
    """Returns one interceptor for each kind of call."""
    return [
        UnaryUnaryCalls(address, deadlines.unary_s),
        UnaryStreamCalls(address, deadlines.download_s),
        StreamUnaryCalls(address, deadlines.upload_s),
        StreamStreamCalls(address, deadlines.line_s),
    ]


@dataclass(frozen=True)
class SyncCalls(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """The same for synchronous channels, which take one object for all kinds."""

    address: str
    deadlines: Deadlines

    def intercept_unary_unary(self, continuation: Continuation, client_call_details: Any, request: Any) -> Any:
        """Sets the deadline and maps the error."""
        return self._answered(continuation(_dated(client_call_details, self.deadlines.unary_s), request))

    def intercept_stream_unary(
        self, continuation: Continuation, client_call_details: Any, request_iterator: Any
    ) -> Any:
        """Sets the deadline and maps the error."""
        return self._answered(continuation(_dated(client_call_details, self.deadlines.upload_s), request_iterator))

    def intercept_unary_stream(self, continuation: Continuation, client_call_details: Any, request: Any) -> Any:
        """Sets the deadline and maps the error."""
        return self._mapped(continuation(_dated(client_call_details, self.deadlines.download_s), request))

    def intercept_stream_stream(
        self, continuation: Continuation, client_call_details: Any, request_iterator: Any
    ) -> Any:
        """Sets the deadline and maps the error."""
        return self._mapped(continuation(_dated(client_call_details, self.deadlines.line_s), request_iterator))

    def _answered(self, call: Any) -> Any:
        error = call.exception()
        if isinstance(error, grpc.RpcError):
            raise from_rpc_error(error, self.address) from error
        return call

    def _mapped(self, answers: Any) -> "MappedAnswers":
        return MappedAnswers(answers, self.address)


class MappedAnswers(Iterator[Any]):
    """A synchronous stream down whose failures are `EbbflowError`s, and which another thread may cancel."""

    def __init__(self, answers: Any, address: str) -> None:
        self._answers, self._address = answers, address

    def __next__(self) -> Any:
        try:
            return next(self._answers)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address) from error

    def __del__(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the stream; whoever waits for an answer gets SERVER_UNAVAILABLE."""
        self._answers.cancel()


class _DatedDetails(grpc.ClientCallDetails):
    pass


def _dated(details: Any, timeout_s: float) -> grpc.ClientCallDetails:
    dated = _DatedDetails()
    for name in ("method", "timeout", "metadata", "credentials", "wait_for_ready", "compression"):
        setattr(dated, name, getattr(details, name, None))
    dated.timeout = details.timeout or timeout_s
    return dated
