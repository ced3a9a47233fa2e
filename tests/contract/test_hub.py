"""The hub ends when it is told to, whatever happens at that moment."""

import asyncio
from typing import Any

from ebbflow.cloud.services.hub import Hub

Plane = Any


async def test_a_hub_that_is_nudged_and_cancelled_at_once_ends(plane: Plane) -> None:
    hub = Hub(plane.cloud)
    running = asyncio.create_task(hub.run(60.0))
    await asyncio.sleep(0.5)
    hub.nudge()
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=5)
    assert done == {running}
    assert running.cancelled()
