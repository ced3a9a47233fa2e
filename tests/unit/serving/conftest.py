"""A tiny student of random weights, on a real engine, behind real servers."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import tiny_students

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import inference_pb2_grpc, resources_pb2
from ebbflow.common.rpc.server import add_health_and_reflection, bind, make_server
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.engine.base import Logits, StepEntry
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answering
from ebbflow.edge.serving.http import create_app
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.rpc import SERVICE, InferenceServicer
from ebbflow.edge.serving.server import HttpServer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_students.train_tokenizer()


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[int, Path]:
    """Weights of releases 1 and 2."""
    folder = tmp_path_factory.mktemp("artefacts")
    paths = {number: folder / f"{number}.int8.safetensors" for number in (1, 2)}
    for number, path in paths.items():
        tiny_students.write_student(path, tokenizer, seed=number)
    return paths


@pytest.fixture
def model(artefacts: dict[int, Path], tokenizer: Tokenizer) -> Callable[..., Model]:
    """Makes a model of release 1 or 2."""

    def make(number: int = 1, student: str = "students/faq") -> Model:
        engine = load_engine(artefacts[number], threads=1)
        return Model(student, f"{student}/releases/{number}", engine, tokenizer)

    return make


@pytest.fixture(scope="module")
def one_engine(artefacts: dict[int, Path], tokenizer: Tokenizer) -> Model:
    """A model for all examples of a property; whoever changes its engine puts it back."""
    return Model("students/faq", "students/faq/releases/1", load_engine(artefacts[1], threads=1), tokenizer)


@pytest.fixture
def slow() -> Callable[[Model], Model]:
    """Makes a model take 10 ms for each step, so that a test can look at it while it runs."""

    def slowed(model: Model) -> Model:
        step = model.engine.step

        def wait(entries: Sequence[StepEntry]) -> list[Logits]:
            time.sleep(0.01)
            return step(entries)

        model.engine.step = wait  # type: ignore[method-assign]
        return model

    return slowed


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(Limits())
    yield hub
    hub.stop()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    store = FeedbackStore(tmp_path / "agent.db")
    yield store
    store.close()


@pytest.fixture
async def server(hub: Hub, store: FeedbackStore) -> AsyncIterator[HttpServer]:
    server = HttpServer(create_app(hub, Answering(hub, store), store), "127.0.0.1:0", grace_s=5)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def client(server: HttpServer) -> AsyncIterator[openai.AsyncOpenAI]:
    """The real client, without retries."""
    async with openai.AsyncOpenAI(base_url=f"http://{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


@dataclass
class Status:
    connected: bool = False
    disconnected_reason: str = "AGENT_QUARANTINED"

    def last_installations(self) -> dict[str, resources_pb2.Installation]:
        failed = resources_pb2.Installation(student="students/new", reason="DISK_FULL")
        return {"students/new": failed}

    def transfers(self) -> pb.GetModelStatusResponse:
        return pb.GetModelStatusResponse(bandwidth_limit=2_000_000)


@pytest.fixture
async def channel(hub: Hub, store: FeedbackStore) -> AsyncIterator[grpc.aio.Channel]:
    server = make_server()
    servicer = InferenceServicer(hub, Answering(hub, store), store, Status())
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    add_health_and_reflection(server, [SERVICE])
    port = bind(server, "127.0.0.1:0", None)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(1)


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)
