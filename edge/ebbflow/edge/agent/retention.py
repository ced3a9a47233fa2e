"""Removes from the device what is past its time, and from memory what was purged."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from ebbflow.edge.feedback.clock import FeedbackClock
from ebbflow.edge.feedback.store import FeedbackStore

_HOUR_S = 3600.0
_UNKNOWN_S = 60.0
PURGE_S = 5.0
"""How soon the agent follows a purge by another process."""


async def retain(store: FeedbackStore, clock: FeedbackClock) -> float:
    """Removes what is past its time, if the time is known; returns the seconds until the next look.

    Before the cloud was heard a device without a battery clock cannot tell how old anything is.
    """
    if not clock.is_known:
        return _UNKNOWN_S
    await asyncio.to_thread(store.apply_retention, clock.now())
    return _HOUR_S


class Purges:
    """Notices `ebbflow-edge privacy purge`, which is a process of its own and cannot reach this one's memory."""

    def __init__(self, marker: Path, forget: Callable[[], None]) -> None:
        """Takes the file that a purge touches, and what to do then. What was purged before is in no memory yet."""
        self._marker, self._forget = marker, forget
        self._touched_ns = self._last()

    async def look(self) -> float:
        """Forgets if there was a purge since the last look; returns the seconds until the next one."""
        before, self._touched_ns = self._touched_ns, self._last()
        if self._touched_ns != before:
            self._forget()
        return PURGE_S

    def _last(self) -> int:
        try:
            return self._marker.stat().st_mtime_ns
        except FileNotFoundError:
            return 0
