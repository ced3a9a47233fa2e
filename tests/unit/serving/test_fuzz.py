"""Whatever JSON comes, the answer is an answer or a clear refusal, and the agent stays up."""

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.server import HttpServer

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**30, -(10**30), 2**63, 10**400, math.nan, math.inf, -math.inf, 1e-320, 5e-324]),
    st.floats(-3, 3),
    st.text(max_size=5),
    st.sampled_from(["\ud800", "\x00", "🦊", "日本", "", "float", "base64", "text", "auto"]),
)
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *("model", "prompt", "messages", "input", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "n", "stop", "seed"),
    *("stream", "stream_options", "logprobs", "top_logprobs", "echo", "user", "timeout_s", "best_of", "suffix"),
    *("tools", "response_format", "encoding_format", "dimensions", "escalate"),
]
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4)
SOUND: dict[str, dict[str, Any]] = {
    "completions": {"model": "faq", "prompt": "Use", "max_tokens": 2},
    "chat/completions": {"model": "faq", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "embeddings": {"model": "faq", "input": "a"},
    "feedback": {"id": "x", "outcome": "accepted"},
    "feedback/consent": {"user": "ada", "allowed": True},
}


@pytest.fixture
async def http(server: HttpServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{server.address}/v1") as http:
        yield http


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example("completions", {"logit_bias": {"1": 1, "01": 2, " 1 ": 3}})
@example("completions", {"prompt": [[]]})
@example("completions", {"prompt": [""]})
@example("chat/completions", {"messages": [{"role": "user", "content": []}]})
@example("chat/completions", {"stop": "\ud800"})
@example("completions", {"seed": -(10**400), "temperature": 5e-324, "min_p": 1})
@given(st.sampled_from(sorted(SOUND)), BODIES)
async def test_any_body_is_answered_or_refused(
    http: httpx.AsyncClient, hub: Hub, one_engine: Model, path: str, changes: dict[str, Any]
) -> None:
    if not hub.models():
        hub.swap(one_engine)
    body = json.dumps(SOUND[path] | changes)
    found = await http.post(path, content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert found.status_code in {200, 400, 404, 429, 504}, found.text
    if found.status_code != 200:
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    elif found.headers["content-type"].startswith("text/event-stream"):
        assert found.text.endswith("data: [DONE]\n\n")
    else:
        json.loads(found.text, parse_constant=pytest.fail)
