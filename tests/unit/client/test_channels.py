import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ebbflow.api.v1 import agent_pb2, agent_pb2_grpc, artefact_pb2, artefact_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from ebbflow.client.admin import AdminClient, listed
from ebbflow.client.channels import channel, sync_channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.client.interceptors import Deadlines
from ebbflow.cloud.identity.authority import Authority
from ebbflow.common.errors import EbbflowError, Reason

SECRET = "what the {} wrote"
GET = fleet_pb2.GetAgentRequest(name="agents/a")


def refuse(context: Any) -> None:
    raise EbbflowError(Reason.STATE_CONFLICT, "not now", name="agents/a")


def blow_up(context: Any) -> None:
    raise KeyError(SECRET.format("user"))


async def _unary(endpoint: Endpoint) -> Any:
    async with channel(endpoint) as open_channel:
        return await fleet_pb2_grpc.FleetServiceStub(open_channel).GetAgent(GET)


async def _down(endpoint: Endpoint) -> Any:
    async with channel(endpoint) as open_channel:
        call = artefact_pb2_grpc.ArtefactServiceStub(open_channel).ReadBlob(artefact_pb2.ReadBlobRequest())
        return [answer async for answer in call]


async def _up(endpoint: Endpoint) -> Any:
    async def chunks() -> AsyncIterator[artefact_pb2.WriteBlobRequest]:
        for _ in range(3):
            yield artefact_pb2.WriteBlobRequest(chunk=b"abc")

    async with channel(endpoint) as open_channel:
        return await artefact_pb2_grpc.ArtefactServiceStub(open_channel).WriteBlob(chunks())


async def _both(endpoint: Endpoint) -> Any:
    async def beats() -> AsyncIterator[agent_pb2.ConnectRequest]:
        for _ in range(3):
            yield agent_pb2.ConnectRequest()

    async with channel(endpoint) as open_channel:
        return [answer async for answer in agent_pb2_grpc.AgentServiceStub(open_channel).Connect(beats())]


def _sync_unary(endpoint: Endpoint) -> Any:
    with sync_channel(endpoint) as open_channel:
        return fleet_pb2_grpc.FleetServiceStub(open_channel).GetAgent(GET)


def _sync_down(endpoint: Endpoint) -> Any:
    with sync_channel(endpoint) as open_channel:
        call = artefact_pb2_grpc.ArtefactServiceStub(open_channel).ReadBlob(artefact_pb2.ReadBlobRequest())
        return list(call)


def _sync_up(endpoint: Endpoint) -> Any:
    with sync_channel(endpoint) as open_channel:
        requests = iter([artefact_pb2.WriteBlobRequest(chunk=b"abc")] * 3)
        return artefact_pb2_grpc.ArtefactServiceStub(open_channel).WriteBlob(requests)


def _sync_both(endpoint: Endpoint) -> Any:
    with sync_channel(endpoint) as open_channel:
        call = agent_pb2_grpc.AgentServiceStub(open_channel).Connect(iter([agent_pb2.ConnectRequest()] * 3))
        return list(call)


async def run(call: Any, endpoint: Endpoint) -> Any:
    if asyncio.iscoroutinefunction(call):
        return await call(endpoint)
    return await asyncio.to_thread(call, endpoint)


KINDS = [_unary, _down, _up, _both, _sync_unary, _sync_down, _sync_up, _sync_both]
every_kind = pytest.mark.parametrize("call", KINDS, ids=lambda call: call.__name__)


@every_kind
async def test_a_call_succeeds_and_its_deadline_reaches_the_server(live: Any, call: Any) -> None:
    await run(call, live.endpoint())
    left = live.seen[0][1] if isinstance(live.seen[0], tuple) else live.seen[0]
    assert left is not None
    assert 5 < left <= 86_400


@every_kind
async def test_an_error_arrives_as_it_was_raised(live: Any, call: Any) -> None:
    live.fail = refuse
    with pytest.raises(EbbflowError, match="not now") as caught:
        await run(call, live.endpoint())
    assert caught.value.reason is Reason.STATE_CONFLICT
    assert caught.value.metadata == {"name": "agents/a"}


@every_kind
async def test_an_unknown_error_tells_nothing_to_the_client_or_the_log(
    live: Any, call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    live.fail = blow_up
    with caplog.at_level(logging.DEBUG), pytest.raises(EbbflowError) as caught:
        await run(call, live.endpoint())
    assert (caught.value.reason, str(caught.value)) == (Reason.INTERNAL, "internal error")
    assert "unhandled KeyError" in caplog.text
    assert "what the user wrote" not in caplog.text


@every_kind
async def test_a_certificate_of_another_authority_is_refused_in_the_handshake(
    live: Any, call: Any, tmp_path: Path
) -> None:
    with pytest.raises(EbbflowError) as caught:
        await run(call, live.endpoint(authority=Authority.create(tmp_path / "other")))
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE
    assert live.seen == []


@every_kind
async def test_a_server_that_is_not_there_is_named_at_once(live: Any, call: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    endpoint = live.endpoint()
    started = time.monotonic()
    with pytest.raises(EbbflowError, match=address) as caught:
        await run(call, Endpoint(address, endpoint.authority_pem, endpoint.certificate_pem, endpoint.key_pem))
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE
    assert time.monotonic() - started < 8


async def test_a_client_without_certificate_does_not_get_in(live: Any) -> None:
    with pytest.raises(EbbflowError) as caught:
        await _unary(Endpoint(live.address, live.authority.certificate_pem))
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE


@pytest.mark.parametrize("call", [_unary, _sync_unary])
async def test_a_server_of_another_authority_is_not_spoken_to(live: Any, call: Any, tmp_path: Path) -> None:
    endpoint = live.endpoint()
    other = Authority.create(tmp_path / "other").certificate_pem
    with pytest.raises(EbbflowError) as caught:
        await run(call, Endpoint(live.address, other, endpoint.certificate_pem, endpoint.key_pem))
    assert caught.value.reason is Reason.AUTHORITY_MISMATCH


async def test_a_name_that_is_not_in_the_servers_certificate_says_what_to_set(live: Any) -> None:
    endpoint = live.endpoint()
    with socket.create_server(("127.0.0.2", 0)) as relay:
        address = f"127.0.0.2:{relay.getsockname()[1]}"
        server = asyncio.create_task(_relay(relay, live.address))
        with pytest.raises(EbbflowError, match="hosts") as caught:
            await _unary(Endpoint(address, endpoint.authority_pem, endpoint.certificate_pem, endpoint.key_pem))
        server.cancel()
        await asyncio.wait([server])
    assert caught.value.reason is Reason.CONFIG_INVALID


async def _relay(listener: socket.socket, target: str) -> None:
    host, port = target.split(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    async with await asyncio.start_server(accept, sock=listener) as server:
        await server.serve_forever()


async def test_a_server_that_is_slow_is_given_up_at_the_deadline(live: Any) -> None:
    live.fail = lambda context: time.sleep(1)
    async with channel(live.endpoint(), deadlines=Deadlines(unary_s=0.2)) as open_channel:
        stub = fleet_pb2_grpc.FleetServiceStub(open_channel)
        with pytest.raises(EbbflowError) as caught:
            await stub.GetAgent(GET)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        await stub.GetAgent(GET, timeout=10)


async def test_a_call_is_tried_again_while_the_server_is_unavailable(live: Any) -> None:
    def fail_twice(context: Any) -> None:
        if len(live.seen) < 3:
            raise EbbflowError(Reason.DATABASE_UNAVAILABLE, "not yet")

    live.fail = fail_twice
    assert (await _unary(live.endpoint())).agent.name == "agents/a"
    assert len(live.seen) == 3


async def test_a_line_can_be_written_and_read_by_hand_and_cancelled(live: Any) -> None:
    async with channel(live.endpoint()) as open_channel:
        call = agent_pb2_grpc.AgentServiceStub(open_channel).Connect()
        await call.write(agent_pb2.ConnectRequest())
        answer = await call.read()
        assert isinstance(answer, agent_pb2.ConnectResponse)
        assert answer.WhichOneof("body") == "hint"
        call.cancel()


async def test_a_cancelled_caller_cancels_the_call(live: Any) -> None:
    live.fail = lambda context: time.sleep(0.5)
    task = asyncio.create_task(_unary(live.endpoint()))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_stream_can_be_cancelled_early(live: Any) -> None:
    with sync_channel(live.endpoint()) as open_channel:
        stub = agent_pb2_grpc.AgentServiceStub(open_channel)
        forever: Iterator[agent_pb2.ConnectRequest] = iter(agent_pb2.ConnectRequest, None)
        stream: Any = stub.Connect(forever)
        assert next(stream).WhichOneof("body") == "hint"
        stream.cancel()
        with pytest.raises(EbbflowError) as caught:
            list(stream)
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE


async def test_the_server_knows_who_calls(live: Any) -> None:
    await _unary(live.endpoint("bob"))
    assert live.seen[0][0] == "admins/bob"


def test_lists_are_read_page_by_page_and_stop_at_their_limit(live: Any) -> None:
    with AdminClient(live.endpoint()) as client:
        everything = list(listed(client.fleet.ListAgents, fleet_pb2.ListAgentsRequest(), "agents"))
        assert [agent.name for agent in everything] == [f"agents/a{number}" for number in range(2500)]
        live.seen.clear()
        some = list(listed(client.fleet.ListAgents, fleet_pb2.ListAgentsRequest(), "agents", limit=1001))
        assert len(some) == 1001
        assert live.seen == [1000, 1]


def test_a_file_is_uploaded_in_chunks(live: Any, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(b"x" * 1_500_000)
    with AdminClient(live.endpoint()) as client:
        assert client.upload(path).size_bytes == 1_500_000
        with pytest.raises(EbbflowError, match="nowhere") as caught:
            client.upload(tmp_path / "nowhere")
    assert caught.value.reason is Reason.CONFIG_INVALID


async def test_a_wrong_call_is_not_an_unavailable_server(live: Any) -> None:
    async with channel(live.endpoint()) as open_channel:
        stub = agent_pb2_grpc.AgentServiceStub(open_channel)
        with pytest.raises(EbbflowError, match="does not know this call") as caught:
            await stub.Renew(agent_pb2.RenewRequest())
    assert caught.value.reason is Reason.INTERNAL


@pytest.mark.slow
async def test_a_line_that_says_nothing_for_minutes_survives_its_keepalive(live: Any) -> None:
    async with channel(live.endpoint()) as open_channel:
        call = agent_pb2_grpc.AgentServiceStub(open_channel).Connect()
        await call.write(agent_pb2.ConnectRequest())
        await call.read()
        await asyncio.sleep(200)
        await call.write(agent_pb2.ConnectRequest())
        answer = await call.read()
        assert answer is not grpc.aio.EOF
        call.cancel()
