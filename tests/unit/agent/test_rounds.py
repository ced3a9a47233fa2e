"""An agent's part in rounds beside a real cloud, when its disk, its operator or its identity is not what it was."""

import asyncio
import datetime as dt
from collections.abc import Collection

import httpx
import pytest
from agent_support import alive, enrolled, until
from agent_world import CloudWorld

from ebbflow.api.v1.feedback_pb2 import RoundPlan
from ebbflow.cloud.registry.tables import Agent as AgentRow
from ebbflow.cloud.services import agent as services
from ebbflow.cloud.services.convert.common import timestamp
from ebbflow.common.privacy.release import privatise
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.agent import runtime
from ebbflow.edge.agent.enrol import Wish, enrol
from ebbflow.edge.agent.profile import device_profile
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.agent.swapping import Room
from ebbflow.edge.feedback.history import Decision

DAY = dt.timedelta(days=1)


def serve_everywhere(cloud: CloudWorld, name: str) -> None:
    cloud.student()
    cloud.publish(1)
    cloud.assign(name, 1)


async def served(cloud: CloudWorld, name: str) -> None:
    await until(lambda: cloud.assignment(name).serving_number == 1)


def last(agent: Agent) -> Decision | None:
    return next(iter(agent.store.decisions()), None)


async def test_a_device_that_lost_its_account_goes_on_where_it_was(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    serve_everywhere(cloud, name)
    async with alive(settings) as agent:
        await served(cloud, name)
        cloud.open_round()
        await until(lambda: len(cloud.batches()) == 1 and not agent.store.pending())
        spent = agent.store.lifetime_spent_nano()
    for file in settings.state.glob("agent.db*"):
        file.unlink()
    async with alive(settings) as agent:
        await until(lambda: agent.store.lifetime_spent_nano() == spent)
        cloud.open_round()
        await until(lambda: len(cloud.batches()) == 2 and not agent.store.pending())
        [account] = agent.store.accounts()
    assert (account.entries, account.rho_spent_nano) == (2, 2 * spent)
    assert len({batch.round_id for batch in cloud.batches()}) == 2


async def test_a_plan_above_the_ceiling_is_declined_and_can_be_looked_at(cloud: CloudWorld) -> None:
    settings = cloud.device(epsilon=1.0)
    name = await enrolled(cloud, settings)
    serve_everywhere(cloud, name)
    async with alive(settings) as agent:
        await served(cloud, name)
        round_id = cloud.open_round()
        await until(lambda: last(agent))
        decision = last(agent)
        assert decision is not None
        assert (decision.round, decision.reason) == (f"rounds/{round_id}", "POLICY_TOO_WEAK")
        assert [bin_.bin_id for bin_ in decision.plan.bins] == ["files", "greetings"]
        assert agent.store.accounts() == []
    assert cloud.batches() == []


async def test_a_new_identity_waits_even_if_the_cloud_does_not(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await enrolled_on_a_used_device(cloud, settings)
    serve_everywhere(cloud, name)
    with cloud.cloud.registry.transaction() as session:
        session.get_one(AgentRow, name.removeprefix("agents/")).new_device = True
    async with alive(settings) as agent:
        await served(cloud, name)
        cloud.open_round()
        await until(lambda: last(agent))
        decision = last(agent)
        assert decision is not None
        assert decision.reason == "IDENTITY_WAITS"
        assert agent.store.policies()["faq"][0] == 1
    assert cloud.batches() == []


async def test_a_round_is_not_answered_long_before_the_window_that_it_is_charged_to(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    cloud.student(window_days=366)
    cloud.publish(1)
    cloud.assign(name, 1)
    async with alive(settings) as agent:
        await served(cloud, name)
        far, near = cloud.open_round(duration=dt.timedelta(days=300)), cloud.open_round()
        await until(lambda: cloud.batches() and not agent.store.pending())
        assert [batch.round_id for batch in cloud.batches()] == [near]
        assert [decision.round for decision in agent.store.decisions()] == [f"rounds/{near}"]
        assert far != near


async def test_what_the_cloud_says_about_the_time_does_not_touch_what_users_did(
    cloud: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    serve_everywhere(cloud, name)
    async with alive(settings):
        await served(cloud, name)
    before = dt.datetime.now(dt.UTC)
    monkeypatch.setattr(services, "timestamp", lambda time: timestamp(time + 730 * DAY))
    async with alive(settings) as agent:
        await until(lambda: agent.connected)
        body = {"model": "faq", "prompt": "How", "max_tokens": 2, "user": "ada"}
        async with httpx.AsyncClient() as client:
            assert (await client.post(f"{agent.endpoints.http}/completions", json=body)).is_success
        cloud.open_round()
        await until(lambda: cloud.batches() and not agent.store.pending())
        charged = agent.store.last_charge_time()
        assert charged is not None
        assert before < charged < before + DAY
        assert agent.store.apply_retention(before + 29 * DAY) == 0
        assert agent.store.apply_retention(before + 31 * DAY) == 1


async def test_a_round_by_the_students_states_counts_all_users_or_waits_until_it_can(
    cloud: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def look(plan: RoundPlan, users: Collection[Contribution]) -> list[int]:
        counted.append(len(users))
        return privatise(plan, users)

    monkeypatch.setattr("ebbflow.edge.feedback.release.privatise", look)
    rooms = [Room(1 << 40, 0)]
    monkeypatch.setattr(runtime, "_room", lambda *_: rooms[-1])
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    serve_everywhere(cloud, name)
    async with alive(settings) as agent:
        await served(cloud, name)
        for user in range(20):
            agent.store.record_interaction("faq", "students/faq/releases/1", f"user {user}", "read a file", "So.")
        cloud.open_round(texts=150, measure=RoundPlan.MEASURE_STUDENT)  # more texts than may wait for an answer
        await until(lambda: last(agent))
        decision = last(agent)
        assert decision is not None
        assert decision.reason == "OUT_OF_MEMORY"
        assert agent.store.accounts() == []
        assert not counted
        rooms.append(Room(1 << 40, 1 << 40))
        agent._rounds.hint()
        await until(lambda: cloud.batches() and not agent.store.pending())
        decision = last(agent)
        assert decision is not None
        assert decision.answered
    assert counted == [20]


async def enrolled_on_a_used_device(cloud: CloudWorld, settings: AgentSettings) -> str:
    wish = Wish(cloud=cloud.enrolment, token=cloud.token())
    return await asyncio.to_thread(enrol, settings.folder, wish, device_profile(settings))
