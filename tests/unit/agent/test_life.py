"""An agent's life beside a real cloud: enrol, install, serve, swap, lose the network, report privately."""

import asyncio
import errno
from typing import Any

import grpc
import openai
import psutil
import pytest
from agent_support import alive, assigned, enrolled, until
from agent_world import CloudWorld
from typer.testing import CliRunner

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.api.v1.inference_pb2_grpc import InferenceServiceStub
from ebbflow.cloud.registry.tables import AgentState
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.status import as_table
from ebbflow.edge.agent.status import ask as ask_status
from ebbflow.edge.main import app


async def ask(agent: Agent, **changes: Any) -> Any:
    async with openai.AsyncOpenAI(base_url=agent.endpoints.http, api_key="none", max_retries=0) as client:
        request: dict[str, Any] = {
            "model": "faq",
            "prompt": "How do I read",
            "max_tokens": 8,
            "seed": 1,
            "user": "ada",
        } | changes
        return await client.completions.create(**request)


def serves(agent: Agent, number: int) -> bool:
    return [model.release for model in agent.hub.models()] == [f"students/faq/releases/{number}"]


async def test_a_release_comes_in_is_swapped_and_reported(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: serves(agent, 1))
        assert (await ask(agent)).model == "students/faq/releases/1"
        await until(lambda: cloud.assignment(name).serving_number == 1)
        cloud.publish(2)
        cloud.assign(name, 2)
        await until(lambda: serves(agent, 2))
        assert (await ask(agent)).model == "students/faq/releases/2"
        await until(lambda: cloud.assignment(name).serving_number == 2)
        cloud.assign(name, 1)
        await until(lambda: serves(agent, 1))


async def test_a_bad_release_leaves_the_old_one_serving_and_says_why(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    cloud.student()
    cloud.publish(1)
    cloud.publish(2, probe_loss=0.5)
    cloud.assign(name, 1)
    async with alive(settings) as agent:
        await until(lambda: serves(agent, 1))
        cloud.assign(name, 2)
        await until(lambda: cloud.assignment(name).installation.get("reason") == "PROBE_FAILED")
        assert serves(agent, 1)
        assert (await ask(agent)).model == "students/faq/releases/1"
        async with grpc.aio.insecure_channel(agent.endpoints.grpc) as channel:
            status = await InferenceServiceStub(channel).GetModelStatus(pb.GetModelStatusRequest())
        last = status.models[0].last_installation
        assert status.models[0].release == "students/faq/releases/1"
        assert (last.release, last.reason) == ("students/faq/releases/2", "PROBE_FAILED")
        assert last.state == resources_pb2.INSTALLATION_STATE_FAILED
        assert last.probe_loss > 1


async def test_without_the_network_the_agent_serves_at_once_and_comes_back_later(world: CloudWorld) -> None:
    settings = world.device()
    async with world.running():
        name = await enrolled(world, settings)
        world.student()
        world.publish(1)
        world.assign(name, 1)
        async with alive(settings) as agent:
            await until(lambda: serves(agent, 1))
    async with alive(settings) as agent:
        assert serves(agent, 1)
        assert (await ask(agent)).choices[0].finish_reason
        await until(lambda: agent.disconnected_reason == "SERVER_UNAVAILABLE")
        async with world.running():
            await until(lambda: agent.connected, limit_s=20)
            assert agent.disconnected_reason == ""
            world.publish(2)
            world.assign(name, 2)
            await until(lambda: serves(agent, 2))
        await until(lambda: not agent.connected)
        assert (await ask(agent)).model == "students/faq/releases/2"


async def test_a_student_that_is_taken_away_is_removed(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: serves(agent, 1))
        cloud.assign(name, None)
        await until(lambda: not agent.hub.models())
        with pytest.raises(openai.InternalServerError):
            await ask(agent)
    assert not list(settings.folder.releases.glob("*"))


async def test_a_round_is_answered_once_with_votes_and_without(cloud: CloudWorld) -> None:
    settings = [cloud.device("used"), cloud.device("unused")]
    names = [await enrolled(cloud, device) for device in settings]
    cloud.student()
    cloud.publish(1)
    for name in names:
        cloud.assign(name, 1)
    async with alive(settings[0]) as used, alive(settings[1]) as unused:
        await until(lambda: serves(used, 1) and serves(unused, 1))
        await until(lambda: all(cloud.assignment(name).serving_number == 1 for name in names))
        for user in ("ada", "bob"):
            await ask(used, user=user)
        cloud.open_round()
        await until(lambda: len(cloud.batches()) == 2, limit_s=20)
        await until(lambda: not used.store.pending() and not unused.store.pending())
        assert [len(agent.store.accounts()) for agent in (used, unused)] == [1, 1]
        await asyncio.sleep(0.5)
        assert len(cloud.batches()) == 2


@pytest.mark.parametrize(
    ("state", "reason"),
    [(AgentState.REVOKED, "CERTIFICATE_REVOKED"), (AgentState.QUARANTINED, "AGENT_QUARANTINED")],
)
async def test_an_agent_that_is_shut_out_serves_on_and_says_so(
    cloud: CloudWorld, state: AgentState, reason: str
) -> None:
    settings = cloud.device()
    name = await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: serves(agent, 1) and agent.connected)
        cloud.shut_out(name, state)
        await until(lambda: agent.disconnected_reason == reason)
        assert (await ask(agent)).model == "students/faq/releases/1"
        status = await asyncio.to_thread(as_table, await asyncio.to_thread(ask_status, settings))
        assert reason in status
        if state is AgentState.QUARANTINED:
            cloud.shut_out(name, AgentState.ACTIVE)
            await until(lambda: agent.connected)


async def test_a_purge_from_the_command_line_empties_the_cache_of_prompts(cloud: CloudWorld) -> None:
    settings = cloud.device()
    await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: serves(agent, 1))
        await ask(agent, prompt="How do I read a file? " * 5, max_tokens=1)
        batcher = agent.hub.batcher("faq")

        def cached_bytes() -> int:
            return batcher.between_steps(lambda engine: engine.memory().cache_bytes).result(10)

        assert cached_bytes() > 0
        words = ["privacy", "purge", "--user", "ada", "--state", str(settings.folder.path)]
        done = await asyncio.to_thread(CliRunner().invoke, app, words)
        assert done.output == "1 interactions deleted\n"
        await until(lambda: cached_bytes() == 0)


async def test_a_sensor_that_fails_costs_neither_the_line_nor_the_agent(
    cloud: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cloud.device()
    await enrolled(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: agent.connected)
        failed = []

        def failing(path: object) -> None:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(psutil, "disk_usage", failing)
        await until(lambda: len(failed) >= 2)
        assert agent.connected


async def test_an_agent_of_which_a_part_ends_by_itself_drains_and_says_so(
    cloud: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cloud.device()
    await enrolled(cloud, settings)
    agent = Agent(settings)

    async def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(agent.link, "run", broken)
    with pytest.raises(EbbflowError) as caught:
        await agent.run(asyncio.Event(), lambda _: None)
    assert caught.value.reason is Reason.INTERNAL
    assert isinstance(caught.value.__cause__, RuntimeError)
    with settings.folder.locked():
        assert not settings.folder.endpoints.exists()
