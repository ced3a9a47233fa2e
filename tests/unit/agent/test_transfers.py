"""When and how fast an agent fetches: windows, a limit, a time before which it must not, and a change of mind."""

import asyncio
import datetime as dt
from typing import Any

import pytest
from agent_support import alive, assigned, enrolled, until
from agent_world import CloudWorld

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.cloud.registry.tables import Release
from ebbflow.cloud.services import desired
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.status import as_table
from ebbflow.edge.agent.status import ask as ask_status
from ebbflow.edge.agent.tally import Tally
from ebbflow.edge.agent.transfers import lines
from ebbflow.edge.delivery.windows import Windows, parse_windows

HOUR = dt.timedelta(hours=1)


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def window(begin: dt.datetime, length: dt.timedelta = HOUR) -> str:
    return f"{begin:%H:%M}-{begin + length:%H:%M}"


def serves(agent: Agent, number: int) -> bool:
    return [model.release for model in agent.hub.models()] == [f"students/faq/releases/{number}"]


def state(agent: Agent) -> "resources_pb2.InstallationState.ValueType":
    last = agent.last_installations().get("students/faq")
    return last.state if last else resources_pb2.INSTALLATION_STATE_UNSPECIFIED


def partial_bytes(settings: Any) -> int:
    return sum(path.stat().st_size for path in settings.folder.releases.glob("faq/partial/*"))


@pytest.fixture
def not_before(monkeypatch: pytest.MonkeyPatch) -> dict[int, dt.datetime]:
    """Times before which the cloud wants releases not to be fetched, by number."""
    times: dict[int, dt.datetime] = {}
    real = desired.state

    def dated(*arguments: Any) -> list[agent_pb2.DesiredRelease]:
        releases = real(*arguments)
        for release in releases:
            if time := times.get(int(release.release.rpartition("/")[2] or 0)):
                release.not_before_time.FromDatetime(time)
        return releases

    monkeypatch.setattr(desired, "state", dated)
    return times


async def test_outside_its_window_an_agent_defers_says_until_when_and_serves_on(cloud: CloudWorld) -> None:
    opens = now() + 3 * HOUR
    settings = cloud.device(bandwidth_limit="100MB/s")
    name = await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: serves(agent, 1))
        agent.traffic.windows = parse_windows([window(opens)], "UTC")
        cloud.publish(2)
        cloud.assign(name, 2)
        await until(lambda: cloud.assignment(name).installation.get("state") == "INSTALLATION_STATE_DEFERRED")
        told = cloud.assignment(name).installation
        resume_time = opens.replace(second=0, microsecond=0)
        assert told["resumeTime" if "resumeTime" in told else "resume_time"] == f"{resume_time:%Y-%m-%dT%H:%M:%SZ}"
        assert serves(agent, 1)
        assert partial_bytes(settings) == 0
        said = as_table(await asyncio.to_thread(ask_status, settings))
        assert "2 deferred" in said
        assert f"Next transfer window: {resume_time:%Y-%m-%d %H:%M} UTC" in said
        assert "Bandwidth limit: 100 MB/s" in said
        agent.traffic.windows = Windows()
        cloud.assign(name, 2)  # any hint will do
        await until(lambda: serves(agent, 2))
        await until(lambda: cloud.assignment(name).serving_number == 2)


async def test_a_transfer_stops_at_the_end_of_its_window_and_goes_on_when_the_next_one_opens(cloud: CloudWorld) -> None:
    settings = cloud.device(bandwidth_limit="4kB/s")  # many seconds from the first bytes to the last
    name = await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: partial_bytes(settings) > 8000)
        said = lines(await asyncio.to_thread(ask_status, settings))
        assert said[0].startswith("Fetching students/faq/releases/1, the full file: 0.0 of 0.")
        agent.traffic.windows = parse_windows([window(now() + 3 * HOUR)], "UTC")
        await until(lambda: state(agent) == resources_pb2.INSTALLATION_STATE_DEFERRED)
        there = partial_bytes(settings)
        assert there > 8000
        assert agent.last_installations()["students/faq"].fetched_bytes >= there
        agent.traffic.windows, agent.traffic._bucket = Windows(), None  # the rest comes as fast as it goes
        cloud.assign(name, 1)
        await until(lambda: serves(agent, 1))
        last = agent.last_installations()["students/faq"]
        assert last.fetched_bytes == full_bytes(cloud, 1)


def sizes(cloud: CloudWorld, number: int) -> list[int]:
    with cloud.cloud.registry.reading() as session:
        targets = session.get_one(Release, ("faq", number)).targets
    return [file["size_bytes"] for file in targets.values()]


def full_bytes(cloud: CloudWorld, number: int) -> int:
    return sum(sizes(cloud, number))


async def test_bytes_of_before_a_restart_count(cloud: CloudWorld) -> None:
    settings = cloud.device(bandwidth_limit="4kB/s")
    await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: partial_bytes(settings) > 8000)
    assert partial_bytes(settings) > 8000
    async with alive(cloud.device()) as agent:
        await until(lambda: serves(agent, 1))
        weights = agent.hub.models()[0]
        assert weights.release.endswith("/1")
        last = agent.last_installations()["students/faq"]
        assert last.fetched_bytes >= max(sizes(cloud, 1)), "all of the weights, of which some came before"


async def test_an_agent_that_ends_while_it_fetches_ends_at_once(cloud: CloudWorld) -> None:
    settings = cloud.device(bandwidth_limit="1kB/s")
    await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(lambda: partial_bytes(settings) > 0)
        assert agent.transfers().HasField("transfer")
    await until(lambda: not agent.transfers().HasField("transfer"))
    assert not list(settings.folder.releases.rglob("weights.safetensors")), "it did not wait for the rest"


async def test_a_release_is_not_fetched_before_its_time(cloud: CloudWorld, not_before: dict[int, dt.datetime]) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    cloud.student()
    cloud.publish(1)
    not_before[1] = now() + dt.timedelta(seconds=4)
    cloud.assign(name, 1)
    async with alive(settings):
        await asyncio.sleep(1.5)
    async with alive(settings) as agent:  # a restart does not lose it
        await until(lambda: serves(agent, 1))
        assert now() >= not_before[1]
        told = agent.last_installations()["students/faq"].update_time.ToDatetime(dt.UTC)
        assert told >= not_before[1]


async def test_a_new_desired_state_replaces_the_wait_at_once(
    cloud: CloudWorld, not_before: dict[int, dt.datetime]
) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    cloud.student()
    cloud.publish(1)
    cloud.publish(2)
    not_before[1] = now() + HOUR
    cloud.assign(name, 1)
    async with alive(settings) as agent:
        await until(lambda: agent.connected)
        await asyncio.sleep(0.5)
        assert not agent.hub.models()
        cloud.assign(name, 2)
        await until(lambda: serves(agent, 2))
        assert not agent.last_installations()["students/faq"].release.endswith("/1")


async def test_a_transfer_that_is_no_longer_wanted_is_given_up(cloud: CloudWorld) -> None:
    settings = cloud.device(bandwidth_limit="1kB/s")
    name = await enrolled(cloud, settings)
    cloud.student()
    cloud.publish(1)
    cloud.publish(2)
    cloud.assign(name, 1)
    async with alive(settings) as agent:
        await until(lambda: partial_bytes(settings) > 0)
        cloud.assign(name, None)
        await until(lambda: not list(settings.folder.releases.glob("*")))
        assert not agent.hub.models()


def test_a_tally_counts_all_attempts_and_what_came_before_a_restart() -> None:
    tally = Tally()
    assert tally.add("faq", b"3", 100, 40) == 140
    assert tally.add("faq", b"3", 10, 140) == 150
    assert tally.add("other", b"1", 5, 0) == 5
    assert tally.add("faq", b"4", 7, 0) == 7


def test_nothing_to_say_says_nothing() -> None:
    assert lines(pb.GetModelStatusResponse()) == []
    derived = pb.Transfer(release="students/faq/releases/2", way=pb.Transfer.WAY_DERIVED)
    answer = pb.GetModelStatusResponse(transfer=derived, failed_deltas=2)
    assert lines(answer) == [
        "Fetching students/faq/releases/2, derived on the device",
        "Deltas that failed, with the full file fetched instead: 2",
    ]


async def test_a_slow_transfer_keeps_telling_the_cloud_that_it_moves_on(cloud: CloudWorld) -> None:
    settings = cloud.device(bandwidth_limit="1kB/s")
    name = await assigned(cloud, settings)
    told: list[int] = []
    async with alive(settings) as agent:
        for _ in range(2):
            before = told[-1] if told else 0
            await until(lambda before=before: reported_bytes(cloud, name) > before, 60)  # type: ignore[misc]
            told.append(reported_bytes(cloud, name))
        assert state(agent) == resources_pb2.INSTALLATION_STATE_FETCHING
    assert 0 < told[0] < told[1]


def reported_bytes(cloud: CloudWorld, name: str) -> int:
    return int(cloud.assignment(name).installation.get("fetchedBytes", 0))


async def test_a_refused_release_is_tried_at_once_when_its_rollout_retries_it(
    cloud: CloudWorld, not_before: dict[int, dt.datetime]
) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    cloud.student()
    cloud.publish(1, probe_loss=99.0)
    cloud.assign(name, 1)
    async with alive(settings) as agent:
        await until(lambda: state(agent) == resources_pb2.INSTALLATION_STATE_FAILED)
        first = agent.last_installations()["students/faq"].update_time.ToNanoseconds()
        not_before[1] = now()  # a retry draws a new turn
        cloud.assign(name, 1)
        await until(lambda: agent.last_installations()["students/faq"].update_time.ToNanoseconds() > first)
