"""InferenceService as a real channel sees it, with health and reflection for everybody else's tools."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.rpc.errors import from_rpc_error
from ebbflow.edge.engine.loss import sequence_loss
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.rpc import SERVICE

Make = Callable[..., Model]
Stub = Any


async def refusal(call: Any) -> EbbflowError:
    async def finish() -> None:
        if hasattr(call, "__aiter__"):
            _ = [message async for message in call]
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish()
    return from_rpc_error(caught.value)


async def test_generate_streams_text_and_ends_with_the_counts(stub: Stub, hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    request = pb.GenerateRequest(prompt="Use open()", user_key="ada", sampling=pb.Sampling(max_tokens=20))
    messages = [message async for message in stub.Generate(request)]
    last = messages[-1]
    assert {message.interaction_id for message in messages} == {last.interaction_id}
    assert last.release == "students/faq/releases/1"
    assert last.prompt_tokens == len(one.tokenizer.encode("Use open()", bos=True))
    assert 0 < last.completion_tokens <= 20
    assert last.finish_reason
    again = [message async for message in stub.Generate(request)]
    assert "".join(m.text for m in again) == "".join(m.text for m in messages), "temperature 0 is greedy"
    await stub.RecordOutcome(
        pb.RecordOutcomeRequest(interaction_id=last.interaction_id, outcome=resources_pb2.OUTCOME_ACCEPTED)
    )


async def test_score_agrees_with_the_engine(stub: Stub, hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    text = "Grüße 🦊 " * 10
    found = await stub.Score(pb.ScoreRequest(student="students/faq", text=text))
    tokens = one.tokenizer.encode(text, bos=True)
    assert found.text_bytes == len(text.encode())
    assert -sum(found.token_log_probs) / len(found.token_log_probs) == pytest.approx(
        sequence_loss(model().engine, tokens),
        abs=1e-4,  # another one: the first is its lane's
    )


async def test_errors_carry_their_reason(stub: Stub, hub: Hub, model: Make) -> None:
    assert (await refusal(stub.Generate(pb.GenerateRequest(prompt="a")))).reason is Reason.NO_MODEL
    hub.swap(model())
    wrong = pb.GenerateRequest(prompt="a", student="students/other")
    assert (await refusal(stub.Generate(wrong))).reason is Reason.MODEL_NOT_FOUND
    long = pb.GenerateRequest(prompt="日本" * 400)
    assert (await refusal(stub.Generate(long))).reason is Reason.CONTEXT_TOO_LONG
    assert (await refusal(stub.Score(pb.ScoreRequest(text="日本" * 400)))).reason is Reason.CONTEXT_TOO_LONG
    hot = pb.GenerateRequest(prompt="a", sampling=pb.Sampling(temperature=3))
    assert (await refusal(stub.Generate(hot))).reason is Reason.INVALID_REQUEST
    unknown = pb.RecordOutcomeRequest(interaction_id="x", outcome=resources_pb2.OUTCOME_EDITED)
    assert (await refusal(stub.RecordOutcome(unknown))).reason is Reason.INTERACTION_NOT_FOUND
    unsaid = pb.RecordOutcomeRequest(interaction_id="x")
    assert (await refusal(stub.RecordOutcome(unsaid))).reason is Reason.INVALID_REQUEST


async def test_status_lists_what_serves_and_what_failed(stub: Stub, hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    found = await stub.GetModelStatus(pb.GetModelStatusRequest())
    assert [status.student for status in found.models] == ["students/faq", "students/new"]
    serving, failed = found.models
    assert (serving.engine, serving.context_tokens) == (one.engine.name, 512)
    assert bool(serving.instruction_set) is not bool(serving.engine_reason), "only a slower engine needs a reason"
    assert serving.precision == resources_pb2.PRECISION_INT8
    assert failed.last_installation.reason == "DISK_FULL"
    assert (found.connected, found.disconnected_reason) == (False, "AGENT_QUARANTINED")


async def test_a_caller_that_cancels_ends_its_generation(
    stub: Stub, hub: Hub, model: Make, slow: Callable[[Model], Model]
) -> None:
    hub.swap(slow(model()))
    call = stub.Generate(pb.GenerateRequest(prompt="Use", sampling=pb.Sampling(max_tokens=500)))
    async with asyncio.timeout(60):
        while not hub.batcher("").load().running:  # noqa: ASYNC110 - another thread runs it
            await asyncio.sleep(0.01)
        call.cancel()
        while hub.batcher("").load().running:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)


async def test_health_and_reflection_need_none_of_our_code(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    found = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert found.status == health_pb2.HealthCheckResponse.SERVING
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
    names = {entry.name async for answer in answers for entry in answer.list_services_response.service}
    assert SERVICE in names


async def test_log_probabilities_come_with_their_text(stub: Stub, hub: Hub, model: Make) -> None:
    hub.swap(one := model())
    sampling = pb.Sampling(max_tokens=20, temperature=1, seed=5, min_p=0.01, repetition_penalty=1.2)
    request = pb.GenerateRequest(prompt="Grüße 🦊", sampling=sampling, top_log_probs=2)
    messages = [message async for message in stub.Generate(request)]
    found = [entry for message in messages for entry in message.log_probs]
    text = "".join(message.text for message in messages)
    assert b"".join(entry.token for entry in found).decode(errors="replace").startswith(text.rstrip("\ufffd"))
    assert all(len(entry.top) == 2 and entry.log_prob <= 0 for entry in found)
    assert all(one.tokenizer.token_bytes(entry.token_id) == entry.token for entry in found)
    request.ClearField("top_log_probs")
    plain = [message async for message in stub.Generate(request)]
    assert "".join(message.text for message in plain) == text
    assert not any(message.log_probs for message in plain)


@pytest.mark.parametrize(
    "sampling",
    [
        pb.Sampling(min_p=2),
        pb.Sampling(repetition_penalty=-1),
        pb.Sampling(presence_penalty=3),
        pb.Sampling(frequency_penalty=float("nan")),
        pb.Sampling(top_p=-0.5),
        pb.Sampling(max_tokens=2**32 - 1),
        pb.Sampling(stop=[""]),
    ],
    ids=lambda sampling: sampling.ListFields()[0][0].name,
)
async def test_a_bad_option_is_named(stub: Stub, hub: Hub, model: Make, sampling: pb.Sampling) -> None:
    hub.swap(model())
    error = await refusal(stub.Generate(pb.GenerateRequest(prompt="a", sampling=sampling)))
    assert error.reason is Reason.INVALID_REQUEST
    assert error.metadata["field"] in {field.name for field, _ in sampling.ListFields()}
    many = pb.GenerateRequest(prompt="a", top_log_probs=21)
    assert (await refusal(stub.Generate(many))).reason is Reason.INVALID_REQUEST
