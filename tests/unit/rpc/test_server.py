import asyncio
import json
import socket
from dataclasses import fields
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.rpc.options import ChannelOptions, ServerOptions
from ebbflow.common.rpc.server import add_health_and_reflection, bind, make_server, serve_until

SERVICE = "ebbflow.api.v1.FleetService"


async def test_a_port_in_use_is_named() -> None:
    first, second = make_server(), make_server()
    port = bind(first, "127.0.0.1:0", None)
    with pytest.raises(EbbflowError, match=str(port)) as caught:
        bind(second, f"127.0.0.1:{port}", None)
    assert caught.value.reason is Reason.PORT_IN_USE


async def test_a_port_that_another_program_holds_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(EbbflowError) as caught:
            bind(make_server(), f"127.0.0.1:{taken.getsockname()[1]}", None)
        assert caught.value.reason is Reason.PORT_IN_USE


@pytest.mark.parametrize("address", ["203.0.113.7:8443", "no.such.host.invalid:8443", "127.0.0.1", "127.0.0.1:99999"])
async def test_an_address_that_is_not_this_machines_is_a_wrong_setting(address: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        bind(make_server(), address, None)
    assert caught.value.reason is Reason.CONFIG_INVALID


async def test_health_and_reflection_answer_for_every_service_and_draining_shows() -> None:
    server, stop = make_server(), asyncio.Event()
    servicer = add_health_and_reflection(server, [SERVICE])
    port = bind(server, "127.0.0.1:0", None)
    serving = asyncio.create_task(serve_until(stop, [server], [servicer], grace_s=5))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await _reflected(channel) >= {SERVICE, "grpc.health.v1.Health"}
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stop.set()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    await asyncio.wait_for(serving, 60)


async def _reflected(channel: grpc.aio.Channel) -> set[str]:
    call: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    await call.done_writing()
    return {service.name for service in answer.list_services_response.service}


def test_clients_ping_less_often_than_servers_allow() -> None:
    assert ChannelOptions().keepalive_s >= ServerOptions().min_ping_interval_s


def test_options_carry_gRPCs_own_names_and_the_retry_policy() -> None:  # noqa: N802
    server = dict(ServerOptions().pairs())
    assert server["grpc.http2.min_ping_interval_without_data_ms"] == 30_000
    assert server["grpc.so_reuseport"] == 0
    client = dict(ChannelOptions().pairs())
    policy = json.loads(str(client["grpc.service_config"]))["methodConfig"][0]["retryPolicy"]
    assert policy["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert policy["maxAttempts"] <= 5, "gRPC caps it there"
    assert all(field.name.endswith("_s") for field in fields(ServerOptions))
