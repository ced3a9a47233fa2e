"""Applications tell a user's word, and forget a user, over HTTP and gRPC."""

from typing import Any

import grpc
import httpx
import pytest

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import inference_pb2_grpc
from ebbflow.edge.feedback.consent import Words
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.server import HttpServer


def keep(store: FeedbackStore, user: str | None) -> None:
    store.record_interaction("faq", "students/faq/releases/1", user, "a question", "an answer")


async def test_a_no_over_http_ends_recording(server: HttpServer, store: FeedbackStore) -> None:
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as client:
        body: dict[str, Any] = {"user": "ada", "allowed": False}
        done = await client.post("/feedback/consent", json=body)
        assert (done.status_code, done.json()) == (200, {"object": "feedback.consent", **body})
        keep(store, "ada")
        assert store.count() == (0, 0)
        await client.post("/feedback/consent", json=body | {"allowed": True})
        keep(store, "ada")
    assert store.count() == (1, 1)
    assert store.words() == Words(allowed=1, refused=0, paused=0)


@pytest.mark.parametrize("user", ["ada@example.org", "", "a b/ç&🦊"])
async def test_a_user_is_forgotten_over_http(server: HttpServer, store: FeedbackStore, user: str) -> None:
    keep(store, user)
    keep(store, "somebody else")
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as client:
        done = await client.delete("/feedback/users", params={"user": user})
    assert done.status_code == 200
    assert done.json() == {"object": "feedback.user", "user": user, "interactions": 1, "deleted": True}
    assert store.count() == (1, 1)


@pytest.mark.parametrize(
    "body", [{}, {"user": "ada"}, {"allowed": True}, {"user": "ada", "allowed": "yes"}, {"user": 3, "allowed": True}]
)
async def test_half_a_word_is_none(server: HttpServer, store: FeedbackStore, body: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as client:
        done = await client.post("/feedback/consent", json=body)
    assert (done.status_code, done.json()["error"]["code"]) == (400, "invalid_request")
    assert store.words() == Words(0, 0, 0)


async def test_a_purge_without_a_user_is_refused(server: HttpServer, store: FeedbackStore) -> None:
    keep(store, None)
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as client:
        assert (await client.delete("/feedback/users")).status_code == 400
    assert store.count() == (1, 1)


async def test_both_over_grpc(channel: grpc.aio.Channel, store: FeedbackStore) -> None:
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    keep(store, "ada")
    await stub.SetConsent(pb.SetConsentRequest(user_key="ada", allowed=False))
    keep(store, "ada")
    assert (await stub.PurgeUser(pb.PurgeUserRequest(user_key="ada"))).interactions == 1
    await stub.SetConsent(pb.SetConsentRequest(allowed=False))
    keep(store, None)
    assert store.count() == (0, 0)
    assert store.words() == Words(allowed=0, refused=2, paused=0)
