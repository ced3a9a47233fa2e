"""Carries what a sequence says from the engine's thread to the event loop."""

import asyncio
import time
from collections import deque

from ebbflow.edge.serving.sequences import Event, Failed, Piece

COALESCE_S = 0.008
"""Pieces that come closer together than this travel as one: each message costs a client and a server about 50 us."""


class Events:
    """The events of one sequence, for one reader."""

    def __init__(self, coalesce_s: float = COALESCE_S) -> None:
        """Belongs to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._coalesce_s = coalesce_s
        self._queue: deque[Event] = deque()
        self._woken = asyncio.Event()
        self._signalled = False
        self._free_s = 0.0

    def put(self, event: Event) -> None:
        """Takes an event; from any thread, without blocking, never raising."""
        self._queue.append(event)
        if self._signalled:
            return  # the reader has not looked since: it will find this one too
        self._signalled = True
        try:
            self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    async def get(self) -> Event:
        """Returns the next event; pieces that have come close together come as one, but the first goes at once.

        Raises:
            EbbflowError: what a `Failed` carries.
        """
        await self._arrival()
        if isinstance(self._queue[0], Piece) and (wait_s := self._free_s - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)
        event = self._queue.popleft()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Piece):
            event = self._joined(event)
            self._free_s = time.monotonic() + self._coalesce_s
        return event

    async def _arrival(self) -> None:
        while not self._queue:
            self._woken.clear()
            self._signalled = False
            if not self._queue:  # looked at again: what came before the line above has signalled nobody
                await self._woken.wait()

    def _joined(self, piece: Piece) -> Piece:
        pieces = [piece]
        while self._queue and isinstance(following := self._queue[0], Piece):
            pieces.append(following)
            self._queue.popleft()
        return Piece.joined(pieces)
