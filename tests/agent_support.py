"""Enrols and runs agents in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from agent_world import CloudWorld

from ebbflow.edge.agent.enrol import Wish, enrol
from ebbflow.edge.agent.profile import device_profile
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.agent.waiting import Pace

FAST = Pace(first_s=0.1, most_s=0.5, shut_out_s=0.5, voted_s=0.2, studied_s=0.5)


async def enrolled(cloud: CloudWorld, settings: AgentSettings) -> str:
    wish = Wish(cloud=cloud.enrolment, token=cloud.token(), new_device=True)
    return await asyncio.to_thread(enrol, settings.folder, wish, device_profile(settings))


async def assigned(cloud: CloudWorld, settings: AgentSettings) -> str:
    """Enrols a device that is to serve the first release of the only student."""
    name = await enrolled(cloud, settings)
    cloud.student()
    cloud.publish(1)
    cloud.assign(name, 1)
    return name


@contextlib.asynccontextmanager
async def alive(settings: AgentSettings) -> AsyncIterator[Agent]:
    """Runs an agent, and drains it in the end."""
    agent = Agent(settings, FAST)
    stop, ready = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(agent.run(stop, lambda _: ready.set()))
    try:
        await asyncio.wait({running, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
        yield agent
    finally:
        stop.set()
        await running


async def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - the condition lies in other threads and processes
            await asyncio.sleep(0.02)
