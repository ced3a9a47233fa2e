"""An agent's part in rounds beside a real cloud, when its disk, its operator or its identity is not what it was."""

import asyncio
import datetime as dt

from agent_support import alive, enrolled, until
from agent_world import CloudWorld

from ebbflow.cloud.registry.tables import Agent as AgentRow
from ebbflow.edge.agent.enrol import Wish, enrol
from ebbflow.edge.agent.profile import device_profile
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.feedback.history import Decision


def serve_everywhere(cloud: CloudWorld, name: str) -> None:
    cloud.student()
    cloud.publish(1)
    cloud.assign(name, 1)


async def served(cloud: CloudWorld, name: str) -> None:
    await until(lambda: cloud.assignment(name).serving_number == 1, limit_s=30)


def last(agent: Agent) -> Decision | None:
    return next(iter(agent.store.decisions()), None)


async def test_a_device_that_lost_its_account_goes_on_where_it_was(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    serve_everywhere(cloud, name)
    async with alive(settings) as agent:
        await served(cloud, name)
        cloud.open_round()
        await until(lambda: len(cloud.batches()) == 1 and not agent.store.pending(), limit_s=30)
        spent = agent.store.lifetime_spent_nano()
    for file in settings.state.glob("agent.db*"):
        file.unlink()
    async with alive(settings) as agent:
        await until(lambda: agent.store.lifetime_spent_nano() == spent, limit_s=30)
        cloud.open_round()
        await until(lambda: len(cloud.batches()) == 2 and not agent.store.pending(), limit_s=30)
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
        await until(lambda: last(agent), limit_s=30)
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
        await until(lambda: last(agent), limit_s=30)
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
        await until(lambda: cloud.batches() and not agent.store.pending(), limit_s=30)
        assert [batch.round_id for batch in cloud.batches()] == [near]
        assert [decision.round for decision in agent.store.decisions()] == [f"rounds/{near}"]
        assert far != near


async def enrolled_on_a_used_device(cloud: CloudWorld, settings: AgentSettings) -> str:
    wish = Wish(cloud=cloud.enrolment, token=cloud.token())
    return await asyncio.to_thread(enrol, settings.folder, wish, device_profile(settings))
