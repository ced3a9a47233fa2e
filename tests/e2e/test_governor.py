"""The governor in a running agent: the native engine, real requests over HTTP, the operator's own command."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from agent_support import alive, enrolled, until
from agent_world import CloudWorld

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.edge.agent import status
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.settings import AgentSettings

STUDENT = "students/faq"


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[CloudWorld]:
    world = CloudWorld(tmp_path)
    async with world.running():
        yield world


@contextlib.asynccontextmanager
async def governed(cloud: CloudWorld, **settings: Any) -> AsyncIterator[tuple[Agent, AgentSettings]]:
    """An agent that serves release 1, which its gate has measured in two precisions."""
    cloud.student()
    cloud.publish(1, precisions=("int8", "int4"))
    wanted = cloud.device(running=2, governor_dwell_s=1, engine="auto", cores=2, **settings)
    cloud.assign(await enrolled(cloud, wanted), 1)
    async with alive(wanted) as agent:
        await until(agent.hub.models)
        await until(lambda: agent.governing.status(STUDENT))
        yield agent, wanted


class Users:
    """People who ask again and again until they are told to stop; every answer is whole or the test fails."""

    def __init__(self, agent: Agent, count: int) -> None:
        self._client = openai.AsyncOpenAI(base_url=agent.endpoints.http, api_key="none", max_retries=0)
        self._stop = asyncio.Event()
        self._count = count
        self.answers = 0

    async def __aenter__(self) -> "Users":
        self._tasks = [asyncio.create_task(self._ask(seed)) for seed in range(self._count)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._client.close()

    async def _ask(self, seed: int) -> None:
        while not self._stop.is_set():
            stream = await self._client.completions.create(
                model="faq", prompt="Use", max_tokens=200, seed=seed, stream=True, user=f"user-{seed}"
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason
            self.answers += 1


def precision_of(agent: Agent) -> str:
    return agent.hub.models()[0].engine.precision


async def asked(settings: AgentSettings) -> pb.GetModelStatusResponse:
    return await asyncio.to_thread(status.ask, settings)


async def test_a_rush_over_http_is_met_by_a_lower_precision_and_quality_returns(cloud: CloudWorld) -> None:
    async with governed(cloud) as (agent, settings):
        engine = agent.hub.models()[0].engine
        assert (engine.name, engine.offered) == ("native", ("int8", "int4"))
        async with Users(agent, 1):
            await asyncio.sleep(1.5)
            assert precision_of(agent) == "int8"
        async with Users(agent, 12) as users:
            await until(lambda: precision_of(agent) == "int4")
            served = users.answers
            await until(lambda: users.answers > served + 12)
            answer = await asked(settings)
        said = answer.models[0].governor
        assert "requests wait for a place" in said.reason
        assert f"{STUDENT} since {said.change_time.ToDatetime():%Y-%m-%d}" in status.as_table(answer)
        assert said.reason in status.as_table(answer)
        await until(lambda: precision_of(agent) == "int8", limit_s=20)
        assert "there is room for it again" in (await asked(settings)).models[0].governor.reason
        assert [model.engine for model in agent.hub.models()] == [engine]  # nothing was installed anew


async def test_a_pin_holds_under_load_and_the_release_stays_the_desired_one(cloud: CloudWorld) -> None:
    async with governed(cloud, precision_pin="int4", precisions=("int8", "int4")) as (agent, settings):
        await until(lambda: precision_of(agent) == "int4")
        async with Users(agent, 12) as users:
            await until(lambda: users.answers > 24)
        await asyncio.sleep(2.5)  # the agent asks for its desired state every two seconds
        assert precision_of(agent) == "int4"
        said = (await asked(settings)).models[0]
        assert (said.governor.pinned, said.release) == (True, f"{STUDENT}/releases/1")
        assert said.governor.reason.startswith("int4 is pinned")


async def test_a_precision_that_the_gate_has_not_measured_is_not_used(cloud: CloudWorld) -> None:
    cloud.student()
    cloud.publish(1)
    settings = cloud.device(running=2, governor_dwell_s=1)
    cloud.assign(await enrolled(cloud, settings), 1)
    async with alive(settings) as agent:
        await until(agent.hub.models)
        async with Users(agent, 12):
            await asyncio.sleep(4)
        assert precision_of(agent) == "int8"
