"""Looks again and again: when told to, and on a jittered timer when nobody says a word."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.waiting import Backoff, Pace, jittered, uniform
from ebbflow.edge.serving.faults import place_of

log = structlog.get_logger(__name__)


class Watcher:
    """Runs one kind of look, never two at a time. A hint that comes during a look causes another one after it."""

    def __init__(self, name: str, look: Callable[[], Awaitable[float]], pace: Pace | None = None) -> None:
        """Prepares; nothing runs before `run`.

        Args:
            name: for the log.
            look: returns the seconds after which to look again when no hint comes.
            pace: bounds of waits after failures.
        """
        self._name, self._look = name, look
        self._backoff = Backoff(pace or Pace())
        self._changed = asyncio.Event()
        self._due_s = float("inf")
        self._reason: Reason | None = None

    def hint(self, spread_s: float = 0.0) -> None:
        """Asks for a look within the next `spread_s` seconds, at a random moment."""
        due_s = asyncio.get_running_loop().time() + uniform(0.0, spread_s)
        if due_s < self._due_s:
            self._due_s = due_s
            self._changed.set()

    def wake_in(self, seconds: float) -> None:
        """Asks for a look after just so many seconds, if none comes before."""
        due_s = asyncio.get_running_loop().time() + seconds
        if due_s < self._due_s:
            self._due_s = due_s
            self._changed.set()

    async def run(self) -> None:
        """Looks for ever. Errors are logged and wait for the next time."""
        while True:
            await self._wait()
            self._due_s = float("inf")  # hints from here on cause another look
            wait_s = await self._once()
            self._due_s = min(self._due_s, asyncio.get_running_loop().time() + wait_s)

    async def _once(self) -> float:
        try:
            wait_s = await self._look()
        except EbbflowError as error:
            if error.reason is not self._reason:  # said once, however often it fails
                log.info("look_failed", subject=self._name, reason=error.reason.name)
            self._reason = error.reason
            return self._backoff.failed(error)
        except Exception as error:  # noqa: BLE001 - one bad look must not end the agent; it is tried again
            log.error("look_failed", subject=self._name, **place_of(error))
            return self._backoff.failed(None)
        self._backoff.succeeded()
        self._reason = None
        return jittered(wait_s)

    async def _wait(self) -> None:
        while (left_s := self._due_s - asyncio.get_running_loop().time()) > 0:
            self._changed.clear()
            try:
                async with asyncio.timeout(min(left_s, 3600.0)):
                    await self._changed.wait()
            except TimeoutError:
                continue
