"""The governor's loop on real batchers and a real engine, with a device whose /proc is written by the test."""

import asyncio
import datetime as dt
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_students
from agent_support import until
from structlog.testing import capture_logs

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.common.codes.artefact import Precision, read_variant
from ebbflow.common.codes.twin import build_student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.agent.governing import Governing, offered
from ebbflow.edge.agent.machine import Machine
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.engine.base import Prepared
from ebbflow.edge.engine.torch_engine import TorchEngine
from ebbflow.edge.serving.generation import Generation
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Event, Failed

MIB = 2**20
STUDENT = "students/faq"


class Ready:
    """Weights of another precision."""

    def __init__(self, precision: Precision, student: Student) -> None:
        self.precision, self.student, self.bytes, self.discarded = precision, student, MIB, False

    def discard(self) -> None:
        self.discarded = True


class SwitchingEngine(TorchEngine):
    """The torch engine with a second precision, as the native one has it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path, self.offered, self.max_threads = path, ("int8", "int4"), 2
        self._threads = 2
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.made: list[Ready] = []
        self.by: set[int] = set()

    @property
    def threads(self) -> int:
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        self.by.add(threading.get_ident())
        self._threads = count

    def prepare(self, precision: str) -> Prepared:
        assert self.gate.wait(60), "the test never let it go on"
        if self.fault:
            raise self.fault
        wanted: Precision = "int4" if precision == "int4" else "int8"
        ready = Ready(wanted, build_student(read_variant(self._path), wanted))
        self.made.append(ready)
        return ready

    def switch(self, prepared: Prepared) -> None:
        assert isinstance(prepared, Ready)
        assert not prepared.discarded
        self.by.add(threading.get_ident())
        self._student, self.precision = prepared.student, prepared.precision


def computing(engine: SwitchingEngine) -> str:
    return engine.precision


class Device:
    """A device whose kernel says what the test wants, and whose time is the test's."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys, self.now_s, self.own_s = folder / "proc", folder / "sys", 0.0, 0.0
        self.proc.mkdir()
        self.busy_ticks = 0.0
        self.others = 0.0
        self.available_mib = 4000
        self.pass_time(0)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.busy_ticks += 100 * seconds * self.others
        cpus = "".join(f"cpu{number} {int(self.busy_ticks / 2)} 0 0 0 0 0 0 0 0 0\n" for number in range(2))
        (self.proc / "stat").write_text(cpus)
        (self.proc / "meminfo").write_text(f"MemTotal: 8192000 kB\nMemAvailable: {self.available_mib * 1024} kB\n")

    def machine(self) -> Machine:
        return Machine(self.proc, self.sys, own_cpu_s=lambda: self.own_s, cpus=lambda: {0, 1})

    def heat(self, degrees: float) -> None:
        zone = self.sys / "class/thermal/thermal_zone0"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "type").write_text("cpu-thermal\n")
        (zone / "temp").write_text(f"{int(degrees * 1000)}\n")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_students.train_tokenizer()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("artefacts") / "1.int8.safetensors"
    tiny_students.write_student(path, tokenizer, seed=1)
    return path


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(Limits(running=4))
    yield hub
    hub.stop()


@pytest.fixture
def serve(hub: Hub, artefact: Path, tokenizer: Tokenizer) -> Callable[[], SwitchingEngine]:
    def swap(number: int = 1) -> SwitchingEngine:
        engine = SwitchingEngine(artefact)
        variants = frozenset({"int8", "int4"})
        hub.swap(Model(STUDENT, f"{STUDENT}/releases/{number}", engine, tokenizer, variants))
        return engine

    return swap


@pytest.fixture
async def governing(hub: Hub, device: Device) -> AsyncIterator[Callable[..., Governing]]:
    made: list[Governing] = []

    def make(limit_bytes: int = 1000 * MIB, **settings: Any) -> Governing:
        wanted = AgentSettings(running=4, governor_dwell_s=5, cores=2, **settings)
        now = lambda: dt.datetime(2026, 11, 22, tzinfo=dt.UTC) + dt.timedelta(seconds=device.now_s)  # noqa: E731
        made.append(Governing(hub, wanted, limit_bytes, now, device.machine(), clock=lambda: device.now_s))
        return made[-1]

    yield make
    for each in made:
        each.close()


async def live(governing: Governing, device: Device, seconds: float) -> None:
    """Looks every half second of the device's time, which is a hundredth of one here."""
    for _ in range(int(seconds * 2)):
        device.pass_time(0.5)
        await governing.look()
        await asyncio.sleep(0.01)


async def becomes(precision: str, engine: SwitchingEngine, governing: Governing, device: Device) -> None:
    """Lets the device live until a precision computes; making it ready takes real time."""
    async with asyncio.timeout(30):
        while computing(engine) != precision:
            await live(governing, device, 0.5)


class Rush:
    """More requests than run at a time, on the real engine, until the block ends."""

    def __init__(self, hub: Hub, count: int = 24) -> None:
        self._batcher = hub.batcher(STUDENT)
        self._count = count
        self.events: list[Event] = []
        self._sequences: list[Generation] = []

    async def __aenter__(self) -> "Rush":
        for seed in range(self._count):
            sampling = Sampling(max_tokens=400, temperature=1.0, seed=seed)
            self._sequences.append(Generation(self._batcher.model, "Use", sampling, self.events.append))
            self._batcher.submit(self._sequences[-1])
        await until(lambda: self._batcher.load().tokens_per_s > 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for sequence in self._sequences:
            sequence.cancelled = True
        await until(lambda: self._batcher.load().running == 0)

    @property
    def failures(self) -> list[Event]:
        return [event for event in self.events if isinstance(event, Failed)]


async def test_a_rush_switches_beside_running_requests_and_quiet_switches_back(
    hub: Hub, device: Device, governing: Callable[..., Governing], serve: Callable[[], SwitchingEngine]
) -> None:
    engine, loop = serve(), governing()
    await live(loop, device, 20)
    assert computing(engine) == "int8"
    with capture_logs() as lines:
        async with Rush(hub) as rush:
            await becomes("int4", engine, loop, device)
            said = loop.status(STUDENT)
            before = len(rush.events)
            await until(lambda: len(rush.events) > before)
            assert rush.failures == []
    assert said
    assert [resources_pb2.Precision.Name(p) for p in said.offered] == ["PRECISION_INT8", "PRECISION_INT4"]
    assert (said.threads, said.pinned) == (2, False)
    assert "requests wait for a place" in said.reason
    assert said.change_time.ToDatetime(dt.UTC) > dt.datetime(2026, 11, 22, 0, 0, 20, tzinfo=dt.UTC)
    governed = [line for line in lines if line["event"] == "governed"]
    assert [(line["student"], line["precision"]) for line in governed if "precision" in line] == [(STUDENT, "int4")]
    await asyncio.sleep(5.1)  # the load's own window of tokens
    await becomes("int8", engine, loop, device)
    assert "there is room for it again" in (loop.status(STUDENT) or pb.Governor()).reason
    assert all(ready.discarded for ready in engine.made)


async def test_changes_are_made_on_the_engines_own_thread(
    hub: Hub, device: Device, governing: Callable[..., Governing], serve: Callable[[], SwitchingEngine]
) -> None:
    engine, loop = serve(), governing(precision_pin="int4")
    device.others = 1.0
    await becomes("int4", engine, loop, device)
    await live(loop, device, 10)
    assert (computing(engine), engine.threads) == ("int4", 1)
    assert engine.by == {hub.batcher(STUDENT)._thread.ident}
    said = loop.status(STUDENT)
    assert said
    assert said.pinned
    assert said.reason == "int4 is pinned; 1 of 2 threads: other programs keep 1.0 of 2 cores busy"


async def test_while_a_precision_is_made_ready_one_thread_lends_its_core(
    hub: Hub, device: Device, governing: Callable[..., Governing], serve: Callable[[], SwitchingEngine]
) -> None:
    engine, loop = serve(), governing(precision_pin="int4")
    engine.gate.clear()
    await live(loop, device, 20)
    assert (computing(engine), engine.threads) == ("int8", 1)
    engine.gate.set()
    await becomes("int4", engine, loop, device)
    await live(loop, device, 1)
    assert engine.threads == 2
    assert (loop.status(STUDENT) or pb.Governor()).reason == "int4 is pinned; 2 threads, as many as are allowed"


async def test_what_cannot_be_made_ready_leaves_the_engine_as_it_is(
    hub: Hub, device: Device, governing: Callable[..., Governing], serve: Callable[[], SwitchingEngine]
) -> None:
    engine, loop = serve(), governing()
    device.heat(85)
    faults: list[tuple[Exception, str]] = [
        (EbbflowError(Reason.OUT_OF_MEMORY, "both do not fit"), "there was not enough memory to make it ready"),
        (MemoryError(), "there was not enough memory to make it ready"),
        (RuntimeError("the prompt was: secret"), "making it ready failed"),
    ]
    for fault, words in faults:
        engine.fault = fault
        with capture_logs() as lines:
            async with Rush(hub):
                async with asyncio.timeout(30):
                    while not any(line["event"] == "precision_not_ready" for line in lines):
                        await live(loop, device, 0.5)
                await live(loop, device, 10)
        assert computing(engine) == "int8"
        assert words in (loop.status(STUDENT) or pb.Governor()).reason
        assert "secret" not in str(lines)
        assert [line["event"] for line in lines if line["event"] != "governed"] == ["precision_not_ready"]
        device.pass_time(4000)
    engine.fault = None
    async with Rush(hub):
        await becomes("int4", engine, loop, device)


async def test_memory_that_the_limit_does_not_allow_is_never_asked_for(
    hub: Hub, device: Device, governing: Callable[..., Governing], serve: Callable[[], SwitchingEngine]
) -> None:
    engine = serve()
    loop = governing(limit_bytes=engine.memory().weights_bytes * 3 // 2)
    async with Rush(hub):
        await live(loop, device, 20)
    assert (engine.precision, engine.made) == ("int8", [])
    assert "there is not enough memory" in (loop.status(STUDENT) or pb.Governor()).reason


async def test_what_a_release_keeps_in_bf16_is_counted_before_a_precision_is_asked_for(
    hub: Hub, device: Device, governing: Callable[..., Governing], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def serve(number: int, keep: str) -> SwitchingEngine:
        path = tmp_path / f"{number}.int8.safetensors"
        tiny_students.write_student(path, tokenizer, seed=1, keep=[keep])
        engine = SwitchingEngine(path)
        hub.swap(Model(STUDENT, f"{STUDENT}/releases/{number}", engine, tokenizer, frozenset({"int8", "int4"})))
        return engine

    engine = serve(1, "*")
    loop = governing(precision_pin="int4", limit_bytes=engine.memory().weights_bytes * 7 // 4)
    await live(loop, device, 20)
    assert engine.made == [], "int4 would take as much again"
    engine = serve(2, "*.o_proj.*")
    await becomes("int4", engine, loop, device)


async def test_what_was_made_ready_for_a_release_that_has_gone_is_given_back(
    hub: Hub, device: Device, governing: Callable[..., Governing], serve: Callable[..., SwitchingEngine]
) -> None:
    first, loop = serve(), governing(precision_pin="int4")
    first.gate.clear()
    await live(loop, device, 2)
    second = serve(2)
    await live(loop, device, 1)
    first.gate.set()
    await becomes("int4", second, loop, device)
    assert (first.precision, second.precision) == ("int8", "int4")
    assert [ready.discarded for ready in (*first.made, *second.made)] == [True, True]


async def test_a_wish_that_passes_while_it_is_made_ready_is_dropped(
    hub: Hub, device: Device, governing: Callable[..., Governing], serve: Callable[[], SwitchingEngine]
) -> None:
    engine, loop = serve(), governing()
    device.heat(85)
    engine.gate.clear()
    async with Rush(hub, count=4):
        await live(loop, device, 4)
        device.heat(60)
        await live(loop, device, 12)
        engine.gate.set()
        await live(loop, device, 4)
    assert computing(engine) == "int8"
    await until(lambda: [ready.discarded for ready in engine.made] == [True])


async def test_a_student_that_goes_is_forgotten(
    hub: Hub, device: Device, governing: Callable[..., Governing], serve: Callable[[], SwitchingEngine]
) -> None:
    serve()
    loop = governing()
    await live(loop, device, 1)
    assert loop.status(STUDENT)
    hub.remove(STUDENT)
    await live(loop, device, 1)
    assert loop.status(STUDENT) is None


def test_only_what_was_measured_and_is_allowed_is_offered(artefact: Path, tokenizer: Tokenizer) -> None:
    engine = SwitchingEngine(artefact)

    def of(variants: set[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
        return offered(Model(STUDENT, f"{STUDENT}/releases/1", engine, tokenizer, frozenset(variants)), allowed)

    assert of({"int8", "int4"}, ("int8", "int4", "bf16")) == ("int8", "int4")
    assert of({"int8"}, ("int8", "int4")) == ("int8",)
    assert of({"int8", "int4"}, ("int8",)) == ("int8",)
    assert of(set(), ()) == ("int8",)


async def test_an_engine_with_nothing_to_choose_has_no_governor(
    hub: Hub, device: Device, governing: Callable[..., Governing], artefact: Path, tokenizer: Tokenizer
) -> None:
    engine = TorchEngine(artefact, threads=1)
    engine.max_threads = 1
    hub.swap(Model(STUDENT, f"{STUDENT}/releases/1", engine, tokenizer))
    loop = governing()
    await live(loop, device, 1)
    assert loop.status(STUDENT) is None
