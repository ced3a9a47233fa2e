"""Removes from the device what is past its time."""

import asyncio

from ebbflow.edge.feedback.clock import FeedbackClock
from ebbflow.edge.feedback.store import FeedbackStore

_HOUR_S = 3600.0
_UNKNOWN_S = 60.0


async def retain(store: FeedbackStore, clock: FeedbackClock) -> float:
    """Removes what is past its time, if the time is known; returns the seconds until the next look.

    Before the cloud was heard a device without a battery clock cannot tell how old anything is.
    """
    if not clock.is_known:
        return _UNKNOWN_S
    await asyncio.to_thread(store.apply_retention, clock.now())
    return _HOUR_S
