"""The teacher behind mutual TLS, asked through real channels."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ebbflow.api.v1 import teacher_pb2 as pb
from ebbflow.api.v1 import teacher_pb2_grpc
from ebbflow.client.channels import channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.cloud.identity import admins, certificates
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.processes import teach
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Agent, AgentState
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr

TOKENS_PER_MINUTE = 4000
As = Callable[[str], Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    torch.set_num_threads(1)
    return Teacher.load(str(tiny_models.save_moe_teacher(tmp_path_factory.mktemp("teacher"))), "float32")


@pytest.fixture
async def connect(teacher: Teacher, sqlite_registry: Registry, tmp_path: Path) -> AsyncIterator[As]:
    """Channels that present the certificate of an admin of a role, or of an agent."""
    authority = Authority.create(tmp_path / "authority")
    settings = CloudSettings.load(
        tmp_path, teacher_listen="localhost:0", teacher_tokens_per_minute=TOKENS_PER_MINUTE, teacher_max_batch=4
    )
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    rules = teach.Rules.of(sqlite_registry)
    server = asyncio.create_task(teach.teach(settings, teacher, authority, rules, stop, ready))
    address = await ready
    channels: list[Any] = []

    def open_as(role: str) -> Any:
        key, now = generate_key(), clock.now()
        with sqlite_registry.transaction() as session:
            if role == "agent":
                session.add(Agent(id="kiosk", state=AgentState.ACTIVE, labels={}, profile={}, create_time=now))
                issued = authority.issue_agent(make_csr(key), "kiosk")
                certificates.record(session, issued, now)
            else:
                issued = admins.create(session, authority, f"{role}-{len(channels)}", role, make_csr(key), now)
        endpoint = Endpoint(address, authority.certificate_pem, issued.certificate_pem, key_to_pem(key))
        channels.append(channel(endpoint))
        return channels[-1]

    yield open_as
    for one in channels:
        await one.close()
    stop.set()
    await server


def _stub(connection: Any) -> Any:
    return teacher_pb2_grpc.TeacherServiceStub(connection)


async def test_it_says_which_model_answers(connect: As, teacher: Teacher) -> None:
    answer = await _stub(connect("operator")).GetTeacher(pb.GetTeacherRequest())
    assert (answer.model, answer.architecture) == (teacher.source, "Ernie4_5_MoeForCausalLM")
    assert (answer.vocabulary_size, answer.context_tokens) == (tiny_models.VOCABULARY, 128)


async def test_prompts_are_continued_in_order_and_alike_for_the_same_seed(connect: As) -> None:
    stub = _stub(connect("owner"))
    request = pb.GenerateTextsRequest(prompts=["the tide", "a fox"] * 3, max_tokens=8, temperature=1.0, seed=5)
    first, second = await asyncio.gather(stub.GenerateTexts(request), stub.GenerateTexts(request))
    assert len(first.texts) == 6
    assert first == second
    assert len(set(first.texts)) > 2


async def test_scores_are_the_teachers_own(connect: As, teacher: Teacher) -> None:
    answer = await _stub(connect("operator")).ScoreTexts(pb.ScoreTextsRequest(texts=["the tide", "a"], top_count=2))
    first = answer.scores[0]
    assert list(first.token_ids) == teacher.tokenizer.encode("the tide", bos=True)
    log_probs = torch.log_softmax(teacher.logits(torch.tensor([list(first.token_ids)]))[0].float(), 1)
    expected = [float(log_probs[i, token]) for i, token in enumerate(first.token_ids[1:])]
    assert list(first.token_log_probs) == pytest.approx(expected, abs=1e-4)
    assert len(first.top_token_ids) == len(first.top_log_probs) == 2 * len(expected)


@pytest.mark.parametrize("role", ["viewer", "agent"])
async def test_agents_and_viewers_may_not_ask_but_may_see_that_it_is_healthy(role: str, connect: As) -> None:
    connection = connect(role)
    with pytest.raises(EbbflowError) as caught:
        await _stub(connection).GetTeacher(pb.GetTeacherRequest())
    assert caught.value.reason is Reason.ROLE_INSUFFICIENT
    health = await health_pb2_grpc.HealthStub(connection).Check(health_pb2.HealthCheckRequest(service=teach.SERVICE))
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_revoked_certificate_is_refused_at_once(connect: As, sqlite_registry: Registry) -> None:
    stub = _stub(connect("operator"))
    await stub.GetTeacher(pb.GetTeacherRequest())
    with sqlite_registry.transaction() as session:
        certificates.revoke_subject(session, "admins/operator-0", clock.now())
    with pytest.raises(EbbflowError) as caught:
        await stub.GetTeacher(pb.GetTeacherRequest())
    assert caught.value.reason is Reason.CERTIFICATE_REVOKED


async def test_a_used_up_quota_says_when_to_come_back_and_spares_others(connect: As) -> None:
    greedy, other = _stub(connect("operator")), _stub(connect("operator"))
    request = pb.ScoreTextsRequest(texts=["the tide comes in and waves break on the shore " * 2] * 64)
    answer = await greedy.ScoreTexts(request)
    tokens = sum(len(score.token_ids) for score in answer.scores)
    assert TOKENS_PER_MINUTE / 2 < tokens < TOKENS_PER_MINUTE
    with pytest.raises(EbbflowError) as caught:
        await greedy.ScoreTexts(request)
    assert caught.value.reason is Reason.QUOTA_EXHAUSTED
    assert 0 < float(caught.value.metadata["retry_after_s"]) <= 60
    await other.ScoreTexts(request)


async def test_tokens_that_were_not_generated_are_not_charged(connect: As) -> None:
    stub = _stub(connect("operator"))
    request = pb.GenerateTextsRequest(prompts=["the tide"] * 40, max_tokens=90)
    answer = await stub.GenerateTexts(request)
    assert len(answer.texts) == 40


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": []},
        {"prompts": ["a"] * 65},
        {"prompts": ["a"], "temperature": -1},
        {"prompts": ["a"], "temperature": float("nan")},
        {"prompts": ["a"], "max_tokens": 1000},
        {"prompts": ["a"] * 64, "max_tokens": 100},
        {"texts": []},
        {"texts": ["a"] * 65},
        {"texts": ["a"], "top_count": 65},
        {"texts": ["the road climbs the hill " * 60]},
    ],
)
async def test_what_cannot_be_asked_is_refused_with_the_field(fields: dict[str, Any], connect: As) -> None:
    stub = _stub(connect("operator"))
    call = stub.ScoreTexts(pb.ScoreTextsRequest(**fields)) if "texts" in fields else None
    with pytest.raises(EbbflowError) as caught:
        await (call or stub.GenerateTexts(pb.GenerateTextsRequest(**fields)))
    assert caught.value.reason is Reason.INVALID_REQUEST


async def test_a_text_without_a_token_to_score_has_no_scores(connect: As) -> None:
    answer = await _stub(connect("operator")).ScoreTexts(pb.ScoreTextsRequest(texts=[""]))
    assert list(answer.scores[0].token_log_probs) == []
