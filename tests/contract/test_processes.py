"""`ebbflow cloud init`, `serve` and `db` as the command line runs them."""

import asyncio
import contextlib
import os
import socket
import sqlite3
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ebbflow.api.v1.fleet_pb2 import ListAgentsRequest
from ebbflow.api.v1.fleet_pb2_grpc import FleetServiceStub
from ebbflow.client.admin import AdminClient
from ebbflow.client.channels import channel
from ebbflow.client.context import FILE_NAME, AdminContext
from ebbflow.cloud.processes import database, init, serve
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.common.errors import EbbflowError, Reason


@pytest.fixture
def cloud(tmp_path: Path, registry_url: str) -> CloudSettings:
    """Settings of a folder that nothing was done with yet, on an empty database."""
    return CloudSettings.load(
        tmp_path / "cloud", registry_url=registry_url, listen="127.0.0.1:0", enrol_listen="127.0.0.1:0"
    )


@contextlib.asynccontextmanager
async def running(settings: CloudSettings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve.serve(settings, stop, embedded=False))
    async with asyncio.timeout(60):
        while not settings.paths.endpoints.exists() and not task.done():  # noqa: ASYNC110 - a file sets no event
            await asyncio.sleep(0.02)
    try:
        yield
    finally:
        stop.set()
        await task


async def test_a_folder_that_was_initialised_serves_its_owner(cloud: CloudSettings) -> None:
    advice = init.initialise(cloud)
    assert "move offline" in advice
    async with running(cloud):
        endpoints = tomllib.loads(cloud.paths.endpoints.read_text())
        context = AdminContext.load(cloud.paths.admin / FILE_NAME)
        assert context.address == endpoints["main"]
        open_channel = channel(context.endpoint())
        assert list((await FleetServiceStub(open_channel).ListAgents(ListAgentsRequest())).agents) == []
        await open_channel.close()
        await asyncio.to_thread(list_agents, cloud)


def list_agents(settings: CloudSettings) -> None:
    with AdminClient.from_context(settings.paths.admin / FILE_NAME) as client:
        assert list(client.fleet.ListAgents(ListAgentsRequest()).agents) == []


def test_initialising_twice_changes_nothing(cloud: CloudSettings) -> None:
    init.initialise(cloud)
    before = {path: path.read_bytes() for path in cloud.home.rglob("*.pem")}
    with pytest.raises(EbbflowError) as caught:
        init.initialise(cloud)
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert {path: path.read_bytes() for path in cloud.home.rglob("*.pem")} == before


async def test_a_lost_owner_gets_a_new_certificate_and_the_old_one_is_shut_out(cloud: CloudSettings) -> None:
    init.initialise(cloud)
    async with running(cloud):
        old = AdminContext.load(cloud.paths.admin / FILE_NAME).endpoint()
        await asyncio.to_thread(init.renew_owner, cloud)
        await asyncio.to_thread(list_agents, cloud)
        with pytest.raises(EbbflowError) as caught:
            await asyncio.to_thread(AdminClient(old).fleet.ListAgents, ListAgentsRequest())
        assert caught.value.reason is Reason.CERTIFICATE_REVOKED


def test_initialising_that_was_cut_short_is_taken_up(cloud: CloudSettings) -> None:
    init.initialise(cloud)
    authority = (cloud.paths.authority / "authority.pem").read_bytes()
    (cloud.paths.admin / FILE_NAME).unlink()
    init.initialise(cloud)
    assert (cloud.paths.authority / "authority.pem").read_bytes() == authority


def test_secrets_are_readable_by_their_owner_only(cloud: CloudSettings) -> None:
    init.initialise(cloud)
    secrets = [*cloud.paths.keys.iterdir(), *cloud.home.rglob("*.key.pem")]
    assert len(secrets) == 8 + 2
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}


def test_names_given_at_initialisation_are_kept(tmp_path: Path) -> None:
    init.initialise(CloudSettings.load(tmp_path / "cloud", hosts=["cloud.example.org"]))
    assert CloudSettings.load(tmp_path / "cloud").hosts == ["cloud.example.org"]


async def test_serving_a_folder_that_was_never_initialised_names_the_cure(cloud: CloudSettings) -> None:
    with pytest.raises(EbbflowError) as caught:
        await serve.serve(cloud, asyncio.Event(), embedded=False)
    assert caught.value.reason is Reason.NOT_INITIALISED


async def test_a_port_in_use_is_said(cloud: CloudSettings) -> None:
    init.initialise(cloud)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EbbflowError) as caught:
            await serve.serve(cloud.model_copy(update={"listen": address}), asyncio.Event(), embedded=False)
    assert (caught.value.reason, caught.value.metadata) == (Reason.PORT_IN_USE, {"address": address})


async def test_an_outdated_schema_is_refused_and_upgraded(tmp_path: Path) -> None:
    settings = CloudSettings.load(tmp_path / "cloud", listen="127.0.0.1:0", enrol_listen="127.0.0.1:0")
    init.initialise(settings)
    newest = database.check(settings)
    os.rename(tmp_path / "cloud" / "registry.db", tmp_path / "kept.db")  # noqa: PTH104
    for suffix in ("-wal", "-shm"):
        (tmp_path / "cloud" / f"registry.db{suffix}").unlink(missing_ok=True)
    sqlite3.connect(tmp_path / "cloud" / "registry.db").close()
    with pytest.raises(EbbflowError) as caught:
        await serve.serve(settings, asyncio.Event(), embedded=False)
    assert caught.value.reason is Reason.SCHEMA_OUTDATED
    assert "db upgrade" in caught.value.cure
    assert database.upgrade(settings) == newest
