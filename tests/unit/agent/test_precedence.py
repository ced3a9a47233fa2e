"""Students take turns: a long transfer for one holds up no change of another, and goes on afterwards."""

import datetime as dt
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from agent_support import alive, enrolled, until
from agent_world import CloudWorld
from structlog.testing import capture_logs

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.cloud.registry.tables import Release
from ebbflow.cloud.services import desired
from ebbflow.edge.agent.precedence import Precedence
from ebbflow.edge.agent.runtime import Agent

SOON_S = 20.0
"""Far less than the transfers here would take."""


def releases(agent: Agent) -> set[str]:
    return {model.release.removeprefix("students/").replace("/releases/", "-") for model in agent.hub.models()}


def full_bytes(cloud: CloudWorld, student_id: str, number: int) -> int:
    with cloud.cloud.registry.reading() as session:
        return sum(file["size_bytes"] for file in session.get_one(Release, (student_id, number)).targets.values())


@asynccontextmanager
async def fetching(cloud: CloudWorld) -> AsyncIterator[tuple[Agent, Callable[..., None]]]:
    """An agent that serves a shop's second release, and has begun a transfer of minutes for another student."""
    settings = cloud.device(bandwidth_limit="1kB/s")
    name = await enrolled(cloud, settings)
    for student_id in ("faq", "shop"):
        cloud.student(student_id)
        cloud.publish(1, student_id)
    cloud.publish(2, "shop")
    cloud.assign(name, 2, "shop")
    async with alive(settings.model_copy(update={"bandwidth_limit": 0})) as agent:
        await until(lambda: releases(agent) == {"shop-2"})
    async with alive(settings) as agent:
        await until(lambda: agent.connected)
        cloud.assign(name, 1, "faq")
        await until(lambda: agent._installer.progress.done_bytes > 0)

        def assign(number: int | None, student_id: str = "shop") -> None:
            cloud.assign(name, number, student_id)

        yield agent, assign


async def end(agent: Agent, cloud: CloudWorld, serves: set[str]) -> None:
    """Lets the long transfer end, which must have gone on from where it was."""
    agent.traffic._bucket = None
    await until(lambda: releases(agent) == serves)
    await until(
        lambda: agent.last_installations()["students/faq"].state == resources_pb2.INSTALLATION_STATE_SERVING, SOON_S
    )
    assert agent.last_installations()["students/faq"].fetched_bytes == full_bytes(cloud, "faq", 1)


async def moved_on(agent: Agent) -> None:
    """Waits for as long as the agent takes to hear what is desired."""
    before = agent._installer.progress.done_bytes
    await until(lambda: agent._installer.progress.done_bytes > before + 1000, SOON_S)


def put_off(logs: list[Any]) -> list[str]:
    return [entry["release"] for entry in logs if entry["event"] == "transfer_put_off"]


async def test_a_student_is_removed_while_another_one_is_fetched(cloud: CloudWorld) -> None:
    async with fetching(cloud) as (agent, assign):
        assign(None)
        await until(lambda: releases(agent) == set(), SOON_S)
        await end(agent, cloud, {"faq-1"})


async def test_a_student_is_rolled_back_while_another_one_is_fetched(cloud: CloudWorld) -> None:
    async with fetching(cloud) as (agent, assign):
        with capture_logs() as logs:
            assign(1)
            await until(lambda: put_off(logs), SOON_S)
            await until(lambda: agent.transfers().transfer.release == "students/shop/releases/1", SOON_S)
            await end(agent, cloud, {"faq-1", "shop-1"})
        assert put_off(logs) == ["students/faq/releases/1"], "who was put off does not put off the other one in turn"


@pytest.mark.slow
async def test_a_release_that_is_refused_puts_off_the_transfer_of_another_student_once(cloud: CloudWorld) -> None:
    async with fetching(cloud) as (agent, assign):
        cloud.publish(3, "shop", probe_loss=99.0)
        with capture_logs() as logs:
            assign(3)
            await until(lambda: agent.transfers().transfer.release == "students/shop/releases/3", SOON_S)
            agent.traffic._bucket, bucket = None, agent.traffic._bucket
            await until(lambda: [entry for entry in logs if entry["event"] == "release_refused"], SOON_S)
            agent.traffic._bucket = bucket
            await until(lambda: agent.transfers().transfer.release == "students/faq/releases/1", SOON_S)
            assign(3)  # said again: not news
            await moved_on(agent)
            await end(agent, cloud, {"faq-1", "shop-2"})
        assert put_off(logs) == ["students/faq/releases/1"]


@pytest.mark.slow
async def test_a_release_puts_off_the_transfer_of_another_student_when_its_time_has_come(
    cloud: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = dt.datetime.now(dt.UTC)
    due = now + dt.timedelta(hours=1)
    real = desired.state

    def dated(*arguments: Any) -> list[Any]:
        found = real(*arguments)
        for each in found:
            if each.release == "students/shop/releases/1":
                each.not_before_time.FromDatetime(due)
        return found

    monkeypatch.setattr(desired, "state", dated)
    async with fetching(cloud) as (agent, assign):
        with capture_logs() as logs:
            assign(1)
            await moved_on(agent)
            assert put_off(logs) == []
            due = now
            await until(lambda: put_off(logs), SOON_S)
            await end(agent, cloud, {"faq-1", "shop-1"})
        assert put_off(logs) == ["students/faq/releases/1"]


def wish(student: str, release: int, begin_s: int = 0) -> agent_pb2.DesiredRelease:
    found = agent_pb2.DesiredRelease(student=student, release=f"{student}/{release}")
    found.not_before_time.seconds = begin_s
    return found


def test_who_had_a_turn_last_comes_last_and_a_wish_that_had_none_comes_first() -> None:
    precedence = Precedence()
    a, b, c = (wish(student, 1) for student in "abc")
    assert precedence.order([a, b, c]) == [a, b, c]
    for had_turn in (b, a, c, b):
        precedence.take(had_turn)
    assert precedence.order([a, b, c]) == [a, c, b]
    assert precedence.order([a, wish("b", 2), c]) == [wish("b", 2), a, c]
    assert precedence.order([a, wish("b", 1, begin_s=7), c]) == [a, c, wish("b", 1, begin_s=7)], "the same wish"


def test_only_what_was_not_in_line_is_new() -> None:
    precedence = Precedence()
    precedence.begin([wish("a", 1), wish("b", 1)])
    assert not precedence.is_new(wish("b", 1))
    assert precedence.is_new(wish("b", 2))
    assert precedence.is_new(wish("b", 1, begin_s=7)), "its rollout retries it"
    precedence.begin([wish("b", 2)])
    assert precedence.is_new(wish("b", 1))
    assert not precedence.is_new(wish("b", 2))
