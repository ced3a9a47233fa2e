"""A hard question on its whole way: application, agent, mutual TLS, the cloud's teacher, and back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import structlog
import tiny_models
import torch
from agent_support import alive, enrolled, until
from agent_world import CloudWorld

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.api.v1.inference_pb2_grpc import InferenceServiceStub
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.processes import teach
from ebbflow.cloud.registry.tables import Student
from ebbflow.cloud.teacher.answers import Generation, generate
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.serving import allowance

PROMPT = "How do I read canary-4711?"
EVERYTHING_IS_HARD = 1.0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    torch.set_num_threads(1)
    return Teacher.load(str(tiny_models.save_llama_teacher(tmp_path_factory.mktemp("teacher"))), "float32")


@contextlib.asynccontextmanager
async def teaching(cloud: CloudWorld, teacher: Teacher, port: int = 0) -> AsyncIterator[str]:
    """Runs `cloud teach` beside the control plane; gives its address."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    settings = cloud.settings.model_copy(update={"teacher_listen": f"127.0.0.1:{port}"})
    authority = Authority.load(settings.paths.authority)
    rules = teach.Rules.of(cloud.cloud.registry)
    server = asyncio.create_task(teach.teach(settings, teacher, authority, rules, stop, ready))
    try:
        yield await ready
    finally:
        stop.set()
        await server


def allow(cloud: CloudWorld) -> None:
    with cloud.cloud.registry.transaction() as session:
        session.get_one(Student, "faq").escalation_policy = {"allowed": True}


async def serving(cloud: CloudWorld, agent: Agent, settings: AgentSettings) -> None:
    cloud.student()
    cloud.publish(1)
    cloud.assign(agent.cloud.credentials.agent, 1)
    await until(agent.hub.models)


async def generate_(agent: Agent, **fields: Any) -> list[pb.GenerateResponse]:
    async with grpc.aio.insecure_channel(agent.endpoints.grpc) as channel:
        request = pb.GenerateRequest(prompt=PROMPT, sampling=pb.Sampling(max_tokens=8), **fields)
        return [message async for message in InferenceServiceStub(channel).Generate(request)]


async def test_a_hard_question_goes_to_the_teacher_only_if_owner_operator_and_user_agree(
    cloud: CloudWorld, teacher: Teacher, tmp_path: Path
) -> None:
    async with teaching(cloud, teacher) as address:
        settings = cloud.device(escalate=("faq",), teacher=address, escalate_below=EVERYTHING_IS_HARD)
        await enrolled(cloud, settings)
        async with alive(settings) as agent:
            await serving(cloud, agent, settings)
            allow(cloud)
            without = await generate_(agent)
            assert not any(message.escalated for message in without)
            with structlog.testing.capture_logs() as logs:
                messages = await generate_(agent, allow_escalation=True, user_key="ada")
            ids = teacher.tokenizer.encode(PROMPT, bos=True)
            (expected,) = generate(teacher, [Generation(ids, 8, 0.0, (0,))])
            assert "".join(message.text for message in messages) == teacher.tokenizer.decode(expected)
            assert all(message.escalated for message in messages)
            assert messages[-1].completion_tokens == len(expected)
            assert "canary" not in str(logs)
            agent.store.record_outcome(without[0].interaction_id, resources_pb2.OUTCOME_ACCEPTED)
            kept = await asyncio.to_thread(lambda: b"".join(p.read_bytes() for p in settings.state.glob("agent.db*")))
            assert teacher.tokenizer.decode(expected).encode() not in kept


async def test_applications_ask_for_it_and_see_it_over_http(cloud: CloudWorld, teacher: Teacher) -> None:
    async with teaching(cloud, teacher) as address:
        settings = cloud.device(escalate=("faq",), teacher=address, escalate_below=EVERYTHING_IS_HARD)
        await enrolled(cloud, settings)
        async with alive(settings) as agent:
            await serving(cloud, agent, settings)
            allow(cloud)
            asked: dict[str, Any] = {"model": "faq", "max_tokens": 8, "temperature": 0.0}
            async with openai.AsyncOpenAI(base_url=agent.endpoints.http, api_key="none", max_retries=0) as client:
                whole = await client.completions.create(prompt=PROMPT, extra_body={"escalate": True}, **asked)
                stay = await client.completions.create(prompt=PROMPT, **asked)
                messages: Any = [{"role": "user", "content": PROMPT}]
                chat = await client.chat.completions.create(
                    messages=messages, extra_body={"escalate": True}, stream=True, **asked
                )
                chunks = [chunk async for chunk in chat]
            assert whole.choices[0].model_extra == {"escalated": True}
            assert whole.choices[0].text != stay.choices[0].text
            assert "escalated" not in (stay.choices[0].model_extra or {})
            assert (chunks[-1].choices[0].model_extra or {}).get("escalated") is True


async def test_the_network_may_go_and_come_back(
    cloud: CloudWorld, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "FIRST_HOLD_S", 0.1)
    async with contextlib.AsyncExitStack() as network:
        address = await network.enter_async_context(teaching(cloud, teacher))
        settings = cloud.device(escalate=("faq",), teacher=address, escalate_below=EVERYTHING_IS_HARD)
        await enrolled(cloud, settings)
        async with alive(settings) as agent:
            await serving(cloud, agent, settings)
            allow(cloud)
            assert (await generate_(agent, allow_escalation=True))[0].escalated
            await network.aclose()
            async with asyncio.timeout(60):
                left_alone = await generate_(agent, allow_escalation=True)
            assert not left_alone[0].escalated
            assert left_alone[-1].completion_tokens == 8
            await network.enter_async_context(teaching(cloud, teacher, int(address.rpartition(":")[2])))
            async with asyncio.timeout(60):
                while not (await generate_(agent, allow_escalation=True))[0].escalated:  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.1)


async def test_without_an_owners_word_the_teacher_never_sees_a_prompt(cloud: CloudWorld, teacher: Teacher) -> None:
    async with teaching(cloud, teacher) as address:
        settings = cloud.device(escalate=("faq",), teacher=address, escalate_below=EVERYTHING_IS_HARD)
        await enrolled(cloud, settings)
        async with alive(settings) as agent:
            await serving(cloud, agent, settings)
            with structlog.testing.capture_logs() as logs:
                messages = await generate_(agent, allow_escalation=True)
            assert not messages[0].escalated
            assert {"escalation_forbidden"} <= {entry["event"] for entry in logs}
