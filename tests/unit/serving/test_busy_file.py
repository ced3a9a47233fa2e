"""Another process holds `agent.db`: answers go out all the same, and what they leave is kept afterwards."""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.edge.feedback import store as store_module
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving import answering as answering_module
from ebbflow.edge.serving.answering import Answering, Question
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Finished
from ebbflow.edge.serving.server import HttpServer

Make = Callable[..., Model]
ANSWER_S = 4.0
"""A second for the record, and the rest for a busy machine."""
AT_ONCE_S = 0.8


@pytest.fixture(autouse=True)
async def one_core() -> None:
    """Gives asyncio the threads that it has on a device with one core."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(5))


def hold(path: Path, *statements: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement).fetchall()
    return connection


async def seconds(work: Awaitable[Any]) -> float:
    begin_s = time.monotonic()
    await work
    return time.monotonic() - begin_s


async def test_answers_and_embeddings_pass_a_file_that_is_locked(
    client: openai.AsyncOpenAI, server: HttpServer, hub: Hub, store: FeedbackStore, model: Make, tmp_path: Path
) -> None:
    hub.swap(model())
    await client.embeddings.create(model="faq", input="hello")

    async def ask(i: int) -> str:
        return (await client.completions.create(model="faq", prompt="How do I", max_tokens=3, user=f"u{i}")).id

    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1", timeout=60) as other:
        with closing(hold(tmp_path / "agent.db", "BEGIN IMMEDIATE")):
            begin_s = time.monotonic()
            asking = asyncio.gather(*(ask(i) for i in range(8)))
            await asyncio.sleep(0.2)
            assert await seconds(client.embeddings.create(model="faq", input="hello")) < AT_ONCE_S
            ids = await asking
            assert time.monotonic() - begin_s < ANSWER_S
            judged = [{"id": id_, "outcome": "rejected"} for id_ in ids]
            telling = asyncio.gather(*(other.post("/feedback", json=body) for body in judged))
            await asyncio.sleep(0.2)
            assert await seconds(client.embeddings.create(model="faq", input="hello")) < AT_ONCE_S
            assert not telling.done()
        assert [done.status_code for done in await telling] == [200] * 8
    assert store.count() == (8, 8)


async def test_answers_pass_a_purge_that_waits_for_a_reader(
    client: openai.AsyncOpenAI, server: HttpServer, hub: Hub, store: FeedbackStore, model: Make, tmp_path: Path
) -> None:
    hub.swap(model())

    async def ask(user: str) -> None:
        await client.completions.create(model="faq", prompt="How do I", max_tokens=3, user=user)

    await ask("ada")
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1", timeout=60) as other:
        with closing(hold(tmp_path / "agent.db", "BEGIN", "SELECT COUNT(*) FROM interactions")):
            await ask("ben")
            purges = asyncio.gather(*(other.delete("/feedback/users", params={"user": "ada"}) for _ in range(6)))
            await asyncio.sleep(0.3)
            asking = asyncio.gather(*(ask(f"u{i}") for i in range(6)))
            assert await seconds(client.embeddings.create(model="faq", input="hello")) < AT_ONCE_S
            assert await seconds(asking) < ANSWER_S
            assert not purges.done()
        assert sorted(done.json()["interactions"] for done in await purges) == [0, 0, 0, 0, 0, 1]
    assert store.count() == (7, 7)


async def test_the_same_over_grpc(stub: Any, hub: Hub, store: FeedbackStore, model: Make, tmp_path: Path) -> None:
    hub.swap(model())
    request = pb.GenerateRequest(prompt="Use open()", user_key="ada", sampling=pb.Sampling(max_tokens=3))
    with closing(hold(tmp_path / "agent.db", "BEGIN IMMEDIATE")):
        begin_s = time.monotonic()
        last = [message async for message in stub.Generate(request)][-1]
        assert time.monotonic() - begin_s < ANSWER_S
        outcome = pb.RecordOutcomeRequest(interaction_id=last.interaction_id, outcome=resources_pb2.OUTCOME_ACCEPTED)
        judging = asyncio.ensure_future(stub.RecordOutcome(outcome))
        await asyncio.sleep(0.2)
        purging = asyncio.ensure_future(stub.PurgeUser(pb.PurgeUserRequest(user_key="ada")))
        await asyncio.sleep(0.2)
        assert not judging.done()
        assert not purging.done()
    await judging
    assert (await purging).interactions == 1
    assert store.count() == (0, 0)


async def test_a_purge_is_done_also_where_its_caller_has_gone(stub: Any, store: FeedbackStore, tmp_path: Path) -> None:
    store.record_interaction("faq", "students/faq/releases/1", "ada", "a question", "an answer")
    with closing(hold(tmp_path / "agent.db", "BEGIN IMMEDIATE")):
        store.submit_interaction("i1", "faq", "students/faq/releases/1", "ben", "a question", "an answer")
        purging = stub.PurgeUser(pb.PurgeUserRequest(user_key="ada"))
        await asyncio.sleep(0.3)
        purging.cancel()
        await asyncio.sleep(0.3)
    await asyncio.to_thread(store.set_consent, "nobody", allowed=True)  # comes behind the purge
    assert store.count() == (1, 1)


async def test_a_record_that_finds_no_room_is_dropped_with_a_warning_that_tells_nothing_of_it(
    hub: Hub, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "WAITING", 1)
    monkeypatch.setattr(answering_module, "_RECORD_S", 0.1)
    hub.swap(model())
    with closing(FeedbackStore(tmp_path / "small.db")) as store:
        answering = Answering(hub, store)

        async def ask(i: int) -> Finished:
            question = Question("faq", "How do I", Sampling(max_tokens=3), f"ada{i}")
            answer = await answering.ask(question)
            *_, last = [event async for event in answer.events()]
            assert isinstance(last, Finished)
            return last

        with capture_logs() as logs, closing(hold(tmp_path / "small.db", "BEGIN IMMEDIATE")):
            assert len(await asyncio.gather(*(ask(i) for i in range(3)))) == 3
        warning = {"event": "interaction_not_recorded", "log_level": "warning", "reason": "QUEUE_FULL"}
        assert [line for line in logs if line["log_level"] != "debug"] == [warning] * 2
        await asyncio.to_thread(store.set_consent, "nobody", allowed=True)
        assert store.count() == (1, 1)


async def test_a_record_that_fails_after_the_answer_is_told_of(
    hub: Hub, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbflow.edge.feedback.database._BUSY_S", 0.5)
    monkeypatch.setattr(answering_module, "_RECORD_S", 0.1)
    hub.swap(model())
    with closing(FeedbackStore(tmp_path / "busy.db")) as store:
        answer = await Answering(hub, store).ask(Question("faq", "How do I", Sampling(max_tokens=3), "ada"))
        with capture_logs() as logs, closing(hold(tmp_path / "busy.db", "BEGIN IMMEDIATE")):
            assert [event async for event in answer.events()]
            assert not logs
            with pytest.raises(sqlite3.OperationalError):  # it comes behind the record
                await asyncio.wrap_future(store.submit_outcome(answer.interaction_id, resources_pb2.OUTCOME_EDITED))
        assert [(line["event"], line["kind"]) for line in logs] == [("interaction_not_recorded", "OperationalError")]
        assert store.count() == (0, 0)
