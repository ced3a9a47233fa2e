"""`EbbflowError` over gRPC: a `google.rpc.Status` with `ErrorInfo`, there and back."""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from ebbflow.common.errors import EbbflowError, Reason

DOMAIN = "ebbflow"

_DETAILS_KEY = "grpc-status-details-bin"
# What a status means that nobody of ours has set, for example because no server answered.
_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_REQUEST,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAUTHENTICATED: Reason.CERTIFICATE_INVALID,
    grpc.StatusCode.PERMISSION_DENIED: Reason.ROLE_INSUFFICIENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.QUOTA_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION: Reason.STATE_CONFLICT,
    grpc.StatusCode.UNAVAILABLE: Reason.SERVER_UNAVAILABLE,
    grpc.StatusCode.CANCELLED: Reason.SERVER_UNAVAILABLE,
}


def to_status(error: EbbflowError) -> grpc.Status:
    """Returns what `context.abort_with_status` wants.

    A fact named `retry_after_s` also becomes a `RetryInfo`.
    """
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=error.metadata))]
    if (seconds := error.metadata.get("retry_after_s")) is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(float(seconds) * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    status = status_pb2.Status(code=error.code.value, message=str(error), details=details)
    result: grpc.Status = rpc_status.to_status(status)
    return result


def from_rpc_error(error: grpc.RpcError, address: str = "the server") -> EbbflowError:
    """Returns the error that the server raised, or one that says why it could not be asked.

    Args:
        error: what a stub raised, synchronous or asynchronous.
        address: who was asked, for the message.
    """
    if info := _error_info(error):
        reason = Reason.__members__.get(info.reason)
        if reason is not None:
            return EbbflowError(reason, _details(error), **info.metadata)
    return _from_transport(error, address)


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _from_transport(error: grpc.RpcError, address: str) -> EbbflowError:
    code, details = _code(error), _details(error)
    if "CERTIFICATE_VERIFY_FAILED" in details:
        message = f"the server at {address} does not belong to the authority that this side trusts"
        return EbbflowError(Reason.AUTHORITY_MISMATCH, message, address=address)
    if "Hostname Verification Check failed" in details:
        message = f"the server's certificate is not made out for {address}; add the name to `hosts` of the cloud"
        return EbbflowError(Reason.CONFIG_INVALID, message, address=address)
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
        refused = "failed to connect" in details and "Socket closed" in details
        message = f"{address} hung up; it may not accept this certificate" if refused else f"no answer from {address}"
        return EbbflowError(Reason.SERVER_UNAVAILABLE, message, address=address)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return EbbflowError(Reason.DEADLINE_EXCEEDED, f"{address} did not answer in time", address=address)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"the server at {address} does not know this call: it is older, or this is another listener"
        return EbbflowError(Reason.INTERNAL, message, address=address)
    return EbbflowError(_BY_STATUS.get(code, Reason.INTERNAL), details or f"{address} answered {code.name}")


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code = getattr(error, "code", None)
    value = code() if callable(code) else None
    return value if isinstance(value, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _details(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    return (details() if callable(details) else None) or ""


def _error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo | None:
    metadata = getattr(error, "trailing_metadata", None)
    for key, value in (metadata() if callable(metadata) else None) or ():
        if key != _DETAILS_KEY:
            continue
        try:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == DOMAIN:
                    return info
        except DecodeError:
            return None
    return None
