"""The interceptor in front of every handler: who calls, may they, and what the audit log says when it fails."""

import datetime as dt
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from sqlalchemy.orm import Session

from ebbflow.cloud.identity import certificates
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.tables import Agent, AgentState
from ebbflow.cloud.services import audit, policy
from ebbflow.cloud.services.call import CURRENT, Call
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.peers import Peer

_log = logging.getLogger(__name__)
OURS_ALONE = {
    Reason.DATABASE_UNAVAILABLE: "the cloud's database does not answer",
    Reason.DISK_FULL: "the cloud's disk is full",
    Reason.FILE_CORRUPT: "a file of the cloud is damaged",
    Reason.NOT_INITIALISED: "the cloud is not fully set up",
}
"""Faults of the cloud's own machine: their messages name paths and addresses, which the log gets and no caller."""
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Any]


def check_standing(session: Session, peer: Peer, now: dt.datetime) -> None:
    """Refuses a peer that TLS let in but the registry does not, or no longer, stand for.

    Raises:
        EbbflowError: CERTIFICATE_EXPIRED, CERTIFICATE_REVOKED, CERTIFICATE_INVALID or AGENT_QUARANTINED.
    """
    if peer.expire_time <= now:
        raise EbbflowError(Reason.CERTIFICATE_EXPIRED, f"the certificate of {peer.identity.name} has expired")
    certificates.check(session, peer.serial)
    if peer.identity.kind == "agent":
        check_agent(session.get(Agent, peer.identity.id), peer.identity.name)


def check_agent(agent: Agent | None, name: str) -> Agent:
    """Returns the agent if it may take part.

    Raises:
        EbbflowError: CERTIFICATE_INVALID if it is unknown, CERTIFICATE_REVOKED or AGENT_QUARANTINED.
    """
    if agent is None:
        raise EbbflowError(Reason.CERTIFICATE_INVALID, f"{name} is not in the registry")
    if agent.state is AgentState.REVOKED:
        raise EbbflowError(Reason.CERTIFICATE_REVOKED, f"{name} was revoked")
    if agent.state is AgentState.QUARANTINED:
        raise EbbflowError(Reason.AGENT_QUARANTINED, f"{name} is quarantined")
    return agent


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Checks every call against the policy and the registry before its handler runs.

    Nothing is remembered between calls: a certificate that is revoked is refused on the very next one.
    """

    def __init__(self, cloud: Cloud, *, identified: bool) -> None:
        """Makes it for one listener.

        Args:
            cloud: the collaborators.
            identified: whether the listener asks for certificates; without them only what anyone may call is allowed.
        """
        self._cloud = cloud
        self._identified = identified
        self._anonymous = audit.Allowance()

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wraps the handler of a call, of whichever of the four kinds it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler  # unknown method: gRPC answers UNIMPLEMENTED
        path = str(handler_call_details.method)
        kind = next(kind for kind in _KINDS if getattr(handler, kind))
        wrap = self._stream if handler.response_streaming else self._unary
        wrapped: grpc.RpcMethodHandler[Any, Any] = handler._replace(  # type: ignore[attr-defined]
            **{kind: wrap(getattr(handler, kind), path)}
        )
        return wrapped

    def _unary(self, behaviour: Behaviour, path: str) -> Behaviour:
        async def guarded(request: Any, context: Context) -> Any:
            async with self._call(path, request, context):
                return await behaviour(request, context)

        return guarded

    def _stream(self, behaviour: Behaviour, path: str) -> Behaviour:
        async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._call(path, request, context):
                answers = behaviour(request, context)
                if not hasattr(answers, "__aiter__"):
                    await answers  # a handler that calls context.write, as health's Watch
                    return
                async with aclosing(answers):
                    async for answer in answers:
                        yield answer

        return guarded

    @asynccontextmanager
    async def _call(self, path: str, request: Any, context: Context) -> AsyncIterator[None]:
        call = Call(method=path.rpartition(".")[2], resource=_resource(request), request_id=_request_id(request))
        CURRENT.set(call)
        rule = policy.rule_of(path)
        try:
            await self._admit(call, rule, context)
            yield
        except Exception as error:
            if rule is None or rule.mutates:
                await self._failed(call, error)
            if isinstance(error, EbbflowError) and (words := OURS_ALONE.get(error.reason)):
                _log.error("%s by %s failed: %s", call.method, call.actor, error)
                raise EbbflowError(error.reason, words) from error
            raise

    async def _admit(self, call: Call, rule: policy.Rule | None, context: Context) -> None:
        if self._identified:
            call.peer = peer = Peer.from_auth_context(context.auth_context())
            await self._cloud.read(lambda session: check_standing(session, peer, clock.now()))
        if rule is None or not rule.allows(call.peer.identity if call.peer else None):
            wanted = rule.wanted() if rule else "nobody"
            message = f"{call.actor} may not call {call.method}; {wanted} may"
            raise EbbflowError(Reason.ROLE_INSUFFICIENT, message, method=call.method)

    async def _failed(self, call: Call, error: Exception) -> None:
        if call.peer is None and not self._anonymous.take(clock.now()):
            _log.warning("not audited: too many anonymous failures of %s (%s)", call.method, audit.code_of(error))
            return
        try:
            await self._cloud.write(lambda session: audit.record(session, call, audit.code_of(error), clock.now()))
        except EbbflowError as lost:
            # The database is down, so nothing can have changed either; the caller shall hear of its own failure.
            _log.warning("not audited: %s of %s by %s (%s)", call.method, call.resource, call.actor, lost.reason.name)


def _resource(request: Any) -> str:
    """The resource that a request names, as far as that can be told without knowing its type."""
    for field in ("name", "student"):
        value = getattr(request, field, "")
        if isinstance(value, str) and value:
            return value
    return ""


def _request_id(request: Any) -> str:
    value = getattr(request, "request_id", "")
    return value if isinstance(value, str) else ""
