"""What an agent tells whoever runs the device, and how it ends."""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import openai
import pytest
import tiny_students
from agent_support import FAST, alive, assigned, until
from agent_world import CloudWorld
from prometheus_client.parser import text_string_to_metric_families

from ebbflow.edge.agent.device_figures import DeviceCollector
from ebbflow.edge.agent.machine import Machine
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.sensors import EnergyMeter
from ebbflow.edge.engine.base import Logits, StepEntry
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.serving.figures import StudentCollector
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.metrics import Metrics
from ebbflow.edge.serving.model import Model


def base_of(agent: Agent) -> str:
    return agent.endpoints.http.removesuffix("/v1")


async def figures(agent: Agent) -> dict[str, float]:
    """All figures, each by its name and the values of its labels, in the order of the labels' names."""
    async with httpx.AsyncClient() as client:
        told = await client.get(f"{base_of(agent)}/metrics")
    return values(told.text)


def values(text: str) -> dict[str, float]:
    return {
        " ".join([sample.name, *(word for _, word in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_the_metrics_tell_of_requests_engine_and_device_until_the_student_is_taken_away(
    cloud: CloudWorld,
) -> None:
    settings = cloud.device()
    name = await assigned(cloud, settings)
    async with alive(settings) as agent:
        await until(agent.hub.models)
        async with openai.AsyncOpenAI(base_url=agent.endpoints.http, api_key="none", max_retries=0) as client:
            answers = [await client.completions.create(model="faq", prompt="How do I", max_tokens=9) for _ in range(3)]
        await until(lambda: agent.connected)
        told = await figures(agent)
        assert told["ebbflow_requests_total faq"] == 3
        assert told["ebbflow_first_token_seconds_count faq"] == 3
        assert told["ebbflow_answer_tokens_total faq"] == sum(a.usage.completion_tokens for a in answers if a.usage)
        ended = {name: count for name, count in told.items() if name.startswith("ebbflow_answers_total ")}
        assert sum(ended.values()) == 3
        assert ended.keys() <= {"ebbflow_answers_total stop faq", "ebbflow_answers_total length faq"}
        assert told["ebbflow_release faq"] == 1
        assert told["ebbflow_precision int8 faq"] == 1
        assert told["ebbflow_cloud_connected"] == 1
        assert told["ebbflow_device_memory_bytes"] > told["ebbflow_device_memory_available_bytes"] > 0
        assert told["ebbflow_device_cores"] >= told["ebbflow_device_free_cores"] >= 0
        cloud.assign(name, None)
        await until(lambda: not agent.hub.models())
        assert not [name for name in await figures(agent) if "faq" in name.split()]


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """The /sys of a device with a sensor, a battery and a counter of energy."""
    files = {
        "class/thermal/thermal_zone0/type": "cpu-thermal",
        "class/thermal/thermal_zone0/temp": "61500",
        "class/power_supply/BAT0/type": "Battery",
        "class/power_supply/BAT0/status": "Discharging",
        "class/power_supply/BAT0/capacity": "42",
        "class/powercap/intel-rapl:0/name": "package-0",
        "class/powercap/intel-rapl:0/energy_uj": "1000000",
        "class/powercap/intel-rapl:0/max_energy_range_uj": "9000000",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    return tmp_path


def test_heat_battery_and_energy_are_told_where_the_machine_tells_them(board: Path, tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.add(DeviceCollector(lambda: False, Machine(sys=board), EnergyMeter(board)))
    (board / "class/powercap/intel-rapl:0/energy_uj").write_text("3500000\n")
    told = values(metrics.exposition()[0].decode())
    assert told["ebbflow_device_temperature_celsius"] == 61.5
    assert (told["ebbflow_device_battery_ratio"], told["ebbflow_device_on_battery"]) == (0.42, 1)
    assert told["ebbflow_device_energy_joules_total"] == 2.5
    assert told["ebbflow_cloud_connected"] == 0
    bare = Metrics()
    bare.add(DeviceCollector(lambda: True, Machine(sys=tmp_path / "none"), EnergyMeter(tmp_path / "none")))
    told = values(bare.exposition()[0].decode())
    assert not [name for name in told if "temperature" in name or "battery" in name or "energy" in name]
    assert told["ebbflow_cloud_connected"] == 1


async def test_a_stopped_agent_says_that_it_drains_and_answers_what_runs(cloud: CloudWorld) -> None:
    settings = cloud.device(grace_s=20)
    await assigned(cloud, settings)
    agent, stop, ready = Agent(settings, FAST), asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(agent.run(stop, lambda _: ready.set()))
    await ready.wait()
    await until(agent.hub.models)
    step = agent.hub.models()[0].engine.step
    released = asyncio.Event()

    def once_released(entries: Sequence[StepEntry]) -> list[Logits]:
        asyncio.run_coroutine_threadsafe(released.wait(), loop).result(20)
        return step(entries)

    loop = asyncio.get_running_loop()
    agent.hub.models()[0].engine.step = once_released  # type: ignore[method-assign]
    async with (
        httpx.AsyncClient(base_url=base_of(agent)) as probe,
        openai.AsyncOpenAI(base_url=agent.endpoints.http, api_key="none", max_retries=0) as client,
    ):
        asked = asyncio.create_task(client.completions.create(model="faq", prompt="How do I", max_tokens=9))
        await until(lambda: agent.hub.batcher("faq").load().running)
        assert (await probe.get("/readyz")).status_code == 200
        stop.set()
        await until(lambda: agent.health.draining)
        answer = await probe.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="faq", prompt="How do I", max_tokens=9)
        assert caught.value.code == "agent_stopping"
        released.set()
        assert (await asked).usage
        await running
        with pytest.raises(httpx.ConnectError):
            await probe.get("/healthz")


def test_the_page_names_the_figures_that_there_are_and_no_others(board: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/how-to/monitor-agents.md").read_text()
    weights = tmp_path / "weights"
    tokenizer = tiny_students.train_tokenizer()
    tiny_students.write_student(weights, tokenizer, seed=1)
    metrics, hub = Metrics(), Hub(Limits())
    hub.swap(Model("students/faq", "students/faq/releases/1", load_engine(weights, threads=1), tokenizer))
    metrics.add(StudentCollector(hub))
    metrics.add(DeviceCollector(lambda: True, Machine(sys=board), EnergyMeter(board)))
    told = metrics.exposition()[0].decode()
    hub.stop()
    types = {kind.split()[2] for kind in told.splitlines() if kind.startswith("# TYPE ebbflow")}
    there = {name for name in types if not name.endswith("_created")}
    named = {name.removesuffix("_bucket") for name in re.findall(r"\bebbflow_[a-z0-9_]+", page)}
    assert named == there
