"""Health for supervisors and balancers, metrics for Prometheus, and an end that drops nobody."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answering
from ebbflow.edge.serving.health import Health, add_health
from ebbflow.edge.serving.http import create_app
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.metrics import Metrics
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.server import HttpServer

Serve = Callable[..., contextlib.AbstractAsyncContextManager[tuple[httpx.AsyncClient, Health]]]
QUESTION = {"model": "faq", "prompt": "How do I", "max_tokens": 40, "seed": 1}


@pytest.fixture
def serve(hub: Hub, store: FeedbackStore) -> Serve:
    """Serves the HTTP API with its health, and gives a client and the health."""

    @contextlib.asynccontextmanager
    async def serving(api_key: str | None = None) -> AsyncIterator[tuple[httpx.AsyncClient, Health]]:
        health = Health(hub)
        app = create_app(hub, Answering(hub, store), store, api_key)
        add_health(app, health, Metrics(), api_key)
        server = HttpServer(app, "127.0.0.1:0", grace_s=5)
        await server.start()
        async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=60) as client:
            yield client, health
        await server.stop()

    return serving


async def test_it_lives_from_the_start_and_is_ready_once_a_release_serves(
    serve: Serve, hub: Hub, model: Callable[..., Model]
) -> None:
    async with serve() as (client, _):
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "unavailable", "reason": "no_release"})
        hub.swap(model())
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
        assert (await client.head("/readyz")).status_code == 200
        hub.remove("students/faq")
        assert (await client.get("/readyz")).json()["reason"] == "no_release"


async def test_health_needs_no_key_and_metrics_need_it(serve: Serve, hub: Hub, model: Callable[..., Model]) -> None:
    hub.swap(model())
    async with serve("sesame") as (client, _):
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        refused = await client.get("/metrics")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        told = await client.get("/metrics", headers={"Authorization": "Bearer sesame"})
        assert told.status_code == 200
        assert told.headers["content-type"].startswith("text/plain")
        assert "process_cpu_seconds_total" in told.text


async def test_without_a_key_a_web_page_cannot_read_the_metrics_by_renaming_this_machine(serve: Serve) -> None:
    async with serve() as (client, _):
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/metrics", headers={"Host": "evil.example"})).status_code == 421


async def test_an_engine_whose_thread_has_ended_shows(serve: Serve, hub: Hub, model: Callable[..., Model]) -> None:
    hub.swap(model())
    async with serve() as (client, _):
        await asyncio.to_thread(hub.batcher("faq").stop)
        for path in ("/healthz", "/readyz"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["reason"]) == (503, "engine_thread_ended")


async def test_while_it_drains_what_runs_is_answered_and_what_comes_is_sent_away(
    serve: Serve, hub: Hub, model: Callable[..., Model], slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    async with serve() as (client, health), asyncio.timeout(60):
        await health.idle()
        running = asyncio.create_task(client.post("/v1/completions", json=QUESTION))
        while not hub.batcher("faq").load().running:  # noqa: ASYNC110 - the engine's thread has no event
            await asyncio.sleep(0.005)
        waiting = asyncio.create_task(health.idle())
        health.drain()
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
        assert (await client.get("/healthz")).status_code == 200
        refused = await client.post("/v1/completions", json=QUESTION)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "agent_stopping")
        assert refused.headers["connection"] == "close"
        assert not waiting.done()
        assert (await running).json()["usage"]["completion_tokens"] >= 1
        await waiting


async def test_a_client_that_goes_away_is_not_waited_for(
    serve: Serve, hub: Hub, model: Callable[..., Model], slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    async with serve() as (client, health), asyncio.timeout(60):
        with pytest.raises(httpx.ReadTimeout):
            await client.post(
                "/v1/completions", json={**QUESTION, "max_tokens": 500}, timeout=httpx.Timeout(60, read=0.2)
            )
        health.drain()
        await health.idle()
