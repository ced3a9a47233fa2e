"""A release takes over beside the old one or in its place, under load: nobody is dropped, no answer is mixed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import openai
import pytest
from agent_support import alive, enrolled, until
from agent_world import CloudWorld
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import resources_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.swapping import RESERVE_BYTES, Room, in_place
from ebbflow.edge.engine.base import Engine, EngineMemory, Logits, Prepared, StepEntry

PROMPTS = ["How do I read", "Grüße", "a block", "Use open() in", "Python?"]
TOKENS = 24
Expected = dict[tuple[str, str], str]


def release(number: int) -> str:
    return f"students/faq/releases/{number}"


def engine_of(agent: Agent) -> Engine:
    return agent.hub.batcher("faq").model.engine


async def serves(agent: Agent, number: int) -> None:
    await until(lambda: [model.release for model in agent.hub.models()] == [release(number)])


def has_failed(agent: Agent, number: int) -> bool:
    last = agent.last_installations()["students/faq"]
    return (last.release, last.state) == (release(number), resources_pb2.INSTALLATION_STATE_FAILED)


def failing_once(action: Callable[[Any], Any], reason: Reason, *, done: bool) -> Callable[[Any], Any]:
    """Makes an action fail the first time: instead of being done, or when it has been."""
    fresh = [True]

    def fail(argument: Any) -> Any:
        if not fresh:
            return action(argument)
        fresh.clear()
        if done:
            action(argument)
        raise EbbflowError(reason, "the test wants it so")

    return fail


def _switch(prepared: Prepared, engine: Engine) -> None:
    engine.switch(prepared)


class Users:
    """Ask all the time, each another prompt, and keep what they get."""

    def __init__(self, agent: Agent) -> None:
        self.client = openai.AsyncOpenAI(base_url=agent.endpoints.http, api_key="none", max_retries=0, timeout=60)
        self.answers: list[tuple[str, str, str]] = []  # release, prompt, text

    async def ask(self, prompt: str) -> tuple[str, str]:
        """Returns the release that every piece of the answer names, and the text."""
        stream = await self.client.completions.create(
            model="faq", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason in {"stop", "length"}
        (named,) = {chunk.model for chunk in chunks}
        return named, "".join(chunk.choices[0].text for chunk in chunks)

    async def learn(self) -> Expected:
        """What the release that serves answers when nobody else asks."""
        return {(named, prompt): text for prompt in PROMPTS for named, text in [await self.ask(prompt)]}

    @contextlib.asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Everybody asks until the block ends, and gets the last answer."""
        ending = asyncio.Event()

        async def keep_asking(prompt: str) -> None:
            while not ending.is_set():
                named, text = await self.ask(prompt)
                self.answers.append((named, prompt, text))

        async with asyncio.TaskGroup() as group:
            for prompt in PROMPTS:
                group.create_task(keep_asking(prompt))
            yield
            ending.set()

    async def answered(self, count: int = len(PROMPTS)) -> None:
        """Waits until so many more answers have come."""
        goal = len(self.answers) + count
        await until(lambda: len(self.answers) >= goal)


@contextlib.asynccontextmanager
async def device(cloud: CloudWorld, **settings: Any) -> AsyncIterator[tuple[Agent, Users, Callable[[int], None]]]:
    """An agent that serves release 1, its users, and how to assign another release."""
    config = cloud.device(**settings)
    name = await enrolled(cloud, config)
    cloud.student()
    cloud.publish(1)
    cloud.assign(name, 1)
    async with alive(config) as agent:
        await serves(agent, 1)
        users = Users(agent)
        yield agent, users, lambda number: cloud.assign(name, number)
        await users.client.close()


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("swap", ["beside", "in_place"])
async def test_under_load_a_swap_drops_nobody_and_every_answer_is_that_of_the_release_it_names(
    cloud: CloudWorld, swap: str, engine: str
) -> None:
    async with device(cloud, swap=swap, engine=engine, running=3) as (agent, users, assign):
        cloud.publish(2)
        expected = await users.learn()
        first = engine_of(agent)
        assign(2)
        await serves(agent, 2)
        expected |= await users.learn()
        assert len(set(expected.values())) > len(PROMPTS)
        async with users.busy():
            for number in (1, 2, 1):
                await users.answered()
                assign(number)
                await serves(agent, number)
            await users.answered()
        assert (engine_of(agent) is first) == (swap == "in_place")
    assert {named for named, _, _ in users.answers} == {release(1), release(2)}
    wrong = [(named, prompt) for named, prompt, text in users.answers if expected[named, prompt] != text]
    assert wrong == []


async def test_left_to_itself_an_agent_swaps_in_place_only_where_memory_is_short(
    cloud: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device(cloud) as (agent, _, assign):
        cloud.publish(2)
        first = engine_of(agent)
        assign(2)
        await serves(agent, 2)
        second = engine_of(agent)
        assert second is not first
        monkeypatch.setattr(agent.swapper, "_room", lambda: Room(limit_bytes=2**40, available_bytes=RESERVE_BYTES))
        assign(1)
        await serves(agent, 1)
        assert engine_of(agent) is second


@pytest.mark.parametrize("engine", ["auto", "torch"])
async def test_in_place_a_release_that_does_not_prove_itself_gives_the_old_one_its_place_back(
    cloud: CloudWorld, engine: str
) -> None:
    async with device(cloud, swap="in_place", engine=engine) as (agent, users, assign):
        cloud.publish(2, probe_loss=0.5)
        expected = await users.learn()
        async with users.busy():
            await users.answered()
            assign(2)
            await until(lambda: "PROBE_FAILED" in {last.reason for last in agent.last_installations().values()})
            await users.answered()
        cloud.publish(3)
        assign(3)
        await serves(agent, 3)
        assert (await users.ask(PROMPTS[0]))[0] == release(3)
    assert {named for named, _, _ in users.answers} == {release(1)}
    assert [text for named, prompt, text in users.answers if expected[named, prompt] != text] == []


@pytest.mark.parametrize("engine", ["auto", "torch"])
async def test_in_place_a_release_of_another_shape_is_loaded_once_the_old_one_is_gone(
    cloud: CloudWorld, engine: str
) -> None:
    async with device(cloud, swap="in_place", engine=engine) as (agent, users, assign):
        cloud.publish(2, layers=2)
        cloud.publish(3, layers=3, probe_loss=0.5)
        expected = await users.learn()
        async with users.busy():
            await users.answered()
            assign(2)
            await serves(agent, 2)
            await users.answered()
            assign(3)
            await until(lambda: "PROBE_FAILED" in {last.reason for last in agent.last_installations().values()})
            await users.answered()
        expected |= await users.learn()
        assert engine_of(agent).config.num_hidden_layers == 2
    assert {named for named, _, _ in users.answers} == {release(1), release(2)}
    assert [text for named, prompt, text in users.answers if expected[named, prompt] != text] == []


async def test_in_place_whatever_fails_on_the_way_the_old_release_answers_again(
    cloud: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device(cloud, swap="in_place") as (agent, users, assign):
        expected = await users.learn()
        engine, swapper, installer = engine_of(agent), agent.swapper, agent.swapper._installer
        # What fails, why, whether it has been done by then, and the layers of a release that gets there.
        for number, (target, name, reason, done, layers) in enumerate(
            [
                (engine, "replace", Reason.FILE_CORRUPT, False, 1),
                (engine, "replace", Reason.OUT_OF_MEMORY, True, 1),
                (installer, "commit", Reason.DISK_FULL, False, 1),
                (swapper, "_load_engine", Reason.OUT_OF_MEMORY, False, 2),
            ],
            start=2,
        ):
            cloud.publish(number, layers=layers)
            monkeypatch.setattr(target, name, failing_once(getattr(target, name), reason, done=done))
            async with users.busy():
                assign(number)
                await until(partial(has_failed, agent, number))
                await users.answered()
            assert await users.learn() == expected
        assert {named for named, _, _ in users.answers} == {release(1)}
        assert [text for named, prompt, text in users.answers if expected[named, prompt] != text] == []
        cloud.publish(6)
        assign(6)
        await serves(agent, 6)


async def test_where_nothing_can_be_put_back_who_waits_hears_so_and_the_next_release_heals_it(
    cloud: CloudWorld,
) -> None:
    async with device(cloud, swap="in_place") as (agent, users, assign):
        cloud.publish(2, probe_loss=0.5)
        for path in cloud.device().folder.releases.rglob("weights.safetensors"):
            path.write_bytes(b"the disk has failed")
        assign(2)
        await until(lambda: not agent.hub.models())
        with pytest.raises(openai.InternalServerError) as caught:
            await users.ask(PROMPTS[0])
        assert caught.value.code == "no_model"
        cloud.publish(3)
        assign(3)
        await serves(agent, 3)
        assert (await users.ask(PROMPTS[0]))[0] == release(3)


async def test_in_place_a_release_is_probed_in_its_own_precision_whatever_the_governor_has_chosen(
    cloud: CloudWorld,
) -> None:
    async with device(cloud, swap="in_place", governor_dwell_s=3600) as (agent, users, assign):
        cloud.publish(2)
        batcher, first = agent.hub.batcher("faq"), engine_of(agent)
        for precision in first.offered[1:]:
            prepared = await asyncio.to_thread(first.prepare, precision)
            batcher.between_steps(partial(_switch, prepared)).result(60)
        assert engine_of(agent).precision == first.offered[-1]
        assign(2)
        await serves(agent, 2)
        assert engine_of(agent).precision == "int8"
        assert (await users.ask(PROMPTS[0]))[0] == release(2)


async def test_an_agent_that_is_stopped_while_a_swap_waits_for_an_answer_ends_in_order(cloud: CloudWorld) -> None:
    async with device(cloud, swap="in_place", grace_s=1) as (agent, users, assign):
        step = engine_of(agent).step

        def slowly(entries: Sequence[StepEntry]) -> list[Logits]:
            time.sleep(0.1)
            return step(entries)

        engine_of(agent).step = slowly  # type: ignore[method-assign]
        cloud.publish(2)
        batcher = agent.hub.batcher("faq")
        asked = [asyncio.create_task(users.ask(PROMPTS[0]))]
        await until(lambda: batcher.load().running)
        assign(2)
        async with asyncio.timeout(60):
            while not batcher.load().queued:  # who comes once the swap has begun must wait
                asked.append(asyncio.create_task(users.ask(PROMPTS[1])))
                await asyncio.sleep(0.3)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 60
    await asyncio.gather(*asked, return_exceptions=True)
    async with alive(cloud.device(swap="in_place")) as agent:
        await serves(agent, 2)


memories = st.builds(EngineMemory, st.integers(0, 10**10), st.integers(0, 10**9), st.just(0), st.just(0), st.just(0))


class Held:
    """An engine of which only the memory matters."""

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory

    def memory(self) -> EngineMemory:
        return self._memory


sizes = st.integers(0, 10**11)


@given(memory=memories, file_bytes=sizes, limit_bytes=sizes, available_bytes=sizes)
def test_left_to_itself_it_goes_beside_exactly_where_both_fit(
    memory: EngineMemory, file_bytes: int, limit_bytes: int, available_bytes: int
) -> None:
    engine: Any = Held(memory)
    room = Room(limit_bytes, available_bytes)
    new_bytes = max(memory.weights_bytes, file_bytes)
    within_limit = memory.weights_bytes + memory.cache_bytes + new_bytes <= limit_bytes
    fits = within_limit and new_bytes + RESERVE_BYTES <= available_bytes
    assert in_place("auto", room, engine, file_bytes) != fits
    assert in_place("in_place", room, engine, file_bytes)
    assert not in_place("beside", room, engine, file_bytes)
