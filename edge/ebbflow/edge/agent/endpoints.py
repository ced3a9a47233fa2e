"""Where a running agent listens, for those who share its state folder."""

import json
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic
from ebbflow.edge.agent.state import StateFolder


@dataclass(frozen=True)
class Endpoints:
    """The listeners of one agent."""

    http: str
    """Base URL for OpenAI's clients, such as "http://127.0.0.1:8080/v1"."""
    grpc: str
    """host:port of InferenceService."""
    grpc_tls: bool
    """Whether InferenceService speaks TLS."""

    @contextmanager
    def published(self, folder: StateFolder) -> Iterator[None]:
        """Keeps `endpoints.toml` there for as long as the block runs."""
        facts = {**asdict(self), "pid": os.getpid()}
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in facts.items()]
        write_atomic(folder.endpoints, "".join(lines).encode())
        try:
            yield
        finally:
            folder.endpoints.unlink(missing_ok=True)


def running(folder: StateFolder) -> Endpoints:
    """Returns where the agent of a state folder listens.

    Raises:
        EbbflowError: AGENT_UNREACHABLE if none runs there.
    """
    try:
        facts = tomllib.loads(folder.endpoints.read_text())
        return Endpoints(http=facts["http"], grpc=facts["grpc"], grpc_tls=facts["grpc_tls"])
    except (OSError, KeyError, ValueError) as error:
        message = f"no agent runs with the state folder {folder.path}"
        raise EbbflowError(Reason.AGENT_UNREACHABLE, message, path=folder.path) from error
