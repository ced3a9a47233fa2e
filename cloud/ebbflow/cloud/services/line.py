"""One agent's live line, as its handler sees it."""

import asyncio
from collections.abc import AsyncIterator

from ebbflow.api.v1 import agent_pb2 as pb
from ebbflow.common.errors import EbbflowError


class Line:
    """Hints on their way to one agent. Hints about the same subject merge, so a slow agent costs no memory.

    Attributes:
        agent_id: whose line it is.
        instance_id: the process at its other end.
        superseded: whether another process has taken the identity over since.
    """

    def __init__(self, agent_id: str, instance_id: str) -> None:
        self.agent_id = agent_id
        self.instance_id = instance_id
        self.superseded = False
        self._spread_ms: dict[pb.Hint.Subject.ValueType, int] = {}
        self._wake = asyncio.Event()
        self._over = False
        self._error: EbbflowError | None = None

    def hint(self, subject: "pb.Hint.Subject.ValueType", spread_ms: int) -> None:
        """Sends a hint soon."""
        self._spread_ms[subject] = spread_ms
        self._wake.set()

    def end(self, error: EbbflowError | None = None) -> None:
        """Ends the line; the agent connects again unless the error says that it may not."""
        self._over, self._error = True, self._error or error
        self._wake.set()

    async def hints(self) -> AsyncIterator[pb.Hint]:
        """Hints, until the line ends.

        Raises:
            EbbflowError: why it was ended.
        """
        while not self._over:
            await self._wake.wait()
            self._wake.clear()
            pending, self._spread_ms = self._spread_ms, {}
            for subject, spread_ms in pending.items():
                yield pb.Hint(subject=subject, spread_ms=spread_ms)
        if self._error is not None:
            raise self._error
