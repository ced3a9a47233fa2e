"""The call that is being answered: who makes it, and what the audit log will say of it."""

from contextvars import ContextVar
from dataclasses import dataclass

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.peers import Peer


@dataclass
class Call:
    """One call. Set before a handler runs, in the handler's own context."""

    method: str
    """Such as "RolloutService/AbortRollout"."""
    peer: Peer | None = None
    """Who calls; None on the enrolment listener."""
    resource: str = ""
    """What it is done to, as far as is known."""
    request_id: str = ""

    @property
    def actor(self) -> str:
        """Who calls, for the audit log."""
        return self.peer.identity.name if self.peer else "anonymous"

    @property
    def caller(self) -> Peer:
        """Who calls.

        Raises:
            EbbflowError: CERTIFICATE_REQUIRED if nobody is known.
        """
        if self.peer is None:
            raise EbbflowError(Reason.CERTIFICATE_REQUIRED, "this call needs a client certificate")
        return self.peer

    @property
    def agent_id(self) -> str:
        """The agent that calls; comes from its certificate and never from a message.

        Raises:
            EbbflowError: CERTIFICATE_REQUIRED if it is no agent.
        """
        if self.caller.identity.kind != "agent":
            raise EbbflowError(Reason.CERTIFICATE_REQUIRED, "this call needs an agent's certificate")
        return self.caller.identity.id


CURRENT: ContextVar[Call] = ContextVar("ebbflow_call")


def current() -> Call:
    """The call that is being answered."""
    return CURRENT.get()
