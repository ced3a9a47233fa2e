"""Who may ask the teacher what: operators and servers of this cloud; agents may escalate, and only that."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.peers import Identity, Peer

_GUARDED = "/ebbflow.api.v1.TeacherService/"
AGENTS_MAY = frozenset({"GetEscalation", "Escalate"})
"""What agents may call, and nobody else."""

Context = grpc.aio.ServicerContext[Any, Any]
Standing = Callable[[Peer], Awaitable[None]]
"""Raises if the registry does not, or no longer, stand for a certificate."""


def caller(context: Context) -> Identity:
    """Returns who calls, from the certificate that TLS has checked.

    Raises:
        EbbflowError: CERTIFICATE_REQUIRED or CERTIFICATE_INVALID.
    """
    return Peer.from_auth_context(context.auth_context()).identity


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Lets health and reflection through, and asks everybody else for standing and role."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wraps the handler of a call of the teacher's service; all of them are unary."""
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(handler_call_details)
        path = str(handler_call_details.method)
        if handler is None or not path.startswith(_GUARDED):
            return handler
        behaviour: Any = handler.unary_unary

        async def guarded(request: Any, context: Context) -> Any:
            peer = Peer.from_auth_context(context.auth_context())
            await self._standing(peer)
            check_role(peer.identity, path.removeprefix(_GUARDED))
            return await behaviour(request, context)

        wrapped: grpc.RpcMethodHandler[Any, Any] = handler._replace(unary_unary=guarded)  # type: ignore[attr-defined]
        return wrapped


def check_role(identity: Identity, method: str) -> None:
    """Refuses whoever may not call a method of the teacher's service.

    Raises:
        EbbflowError: ROLE_INSUFFICIENT.
    """
    if method in AGENTS_MAY:
        allowed, wanted = identity.kind == "agent", "agents"
    else:
        allowed = identity.kind == "server" or (identity.kind == "admin" and identity.allows("operator"))
        wanted = "admins with role operator"
    if not allowed:
        message = f"{identity.name} may not call {method} of the teacher; {wanted} may"
        raise EbbflowError(Reason.ROLE_INSUFFICIENT, message, method=method)
