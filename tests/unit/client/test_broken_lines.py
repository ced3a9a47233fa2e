"""Streams over a line that breaks at any moment: each one ends, with its answers or with an error."""

import contextlib
import json
import os
import pkgutil
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import pytest
from faults.proxy import Wire

import ebbflow.api.v1
from ebbflow.api.v1 import artefact_pb2, artefact_pb2_grpc
from ebbflow.client.admin import AdminClient
from ebbflow.client.channels import STREAMS, sync_channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.rpc.options import ChannelOptions

READERS, CALLS_OF_A_CHANNEL = 12, 4
BREAKING_S, DEADLINE_S = 20.0, 3.0


class Reader(threading.Thread):
    """Reads one stream after the other until it is told to stop."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(daemon=True)
        self.endpoint, self.stopping = endpoint, threading.Event()
        self.answered = self.failed = 0
        self.channel: grpc.Channel | None = None

    def run(self) -> None:
        while not self.stopping.is_set():
            with sync_channel(self.endpoint) as self.channel:
                for _ in range(CALLS_OF_A_CHANNEL):
                    self.read(artefact_pb2_grpc.ArtefactServiceStub(self.channel))

    def read(self, stub: Any) -> None:
        try:
            list(stub.ReadBlob(artefact_pb2.ReadBlobRequest(), timeout=DEADLINE_S))
            self.answered += 1
        except EbbflowError:
            self.failed += 1
            time.sleep(0.02)


@pytest.mark.slow
def test_a_stream_ends_however_its_line_breaks(live: Any) -> None:
    host, _, port = live.address.partition(":")
    live.fail = lambda _: time.sleep(0.003)
    wire, chance = Wire((host, int(port))), random.Random(7)
    readers = [Reader(replace(live.endpoint(), address=f"{host}:{wire.port}")) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    until_s = time.monotonic() + BREAKING_S
    while time.monotonic() < until_s:
        time.sleep(chance.uniform(0.02, 0.4))
        wire.cut()
        time.sleep(chance.choice((0.0, 0.0, 0.3, 0.7)))
        wire.join()
    for reader in readers:
        reader.stopping.set()
    end_s = time.monotonic() + CALLS_OF_A_CHANNEL * DEADLINE_S + 5
    for reader in readers:
        reader.join(max(0.0, end_s - time.monotonic()))
    hanging = [reader for reader in readers if reader.is_alive()]
    for reader in hanging:
        with contextlib.suppress(ValueError):
            assert reader.channel
            reader.channel.close()  # which does end them
    wire.close()
    assert not hanging, f"{len(hanging)} of {READERS} readers wait for ever"
    assert sum(reader.answered for reader in readers) > READERS
    assert sum(reader.failed for reader in readers) > READERS


@pytest.mark.slow
def test_an_upload_ends_however_its_line_breaks(live: Any, tmp_path: Path) -> None:
    """In processes of their own: what may happen is that one is aborted."""
    host, _, port = live.address.partition(":")
    wire, chance = Wire((host, int(port))), random.Random(7)
    endpoint = live.endpoint()
    for name in ("authority_pem", "certificate_pem", "key_pem"):
        (tmp_path / name).write_bytes(getattr(endpoint, name))
    command = [sys.executable, "-c", UPLOADS, f"{host}:{wire.port}", str(tmp_path), str(BREAKING_S), str(DEADLINE_S)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as uploading:
        assert uploading.stdout
        assert uploading.stdout.readline() == "begun\n"
        until_s = time.monotonic() + BREAKING_S
        while time.monotonic() < until_s and uploading.poll() is None:
            time.sleep(chance.uniform(0.02, 0.4))
            wire.cut()
            time.sleep(chance.choice((0.0, 0.0, 0.3, 0.7)))
            wire.join()
        try:
            out, _ = uploading.communicate(timeout=60)
        finally:
            uploading.kill()
    wire.close()
    assert uploading.returncode == 0, f"it ended with {uploading.returncode}"
    answered, failed = map(int, out.split())
    assert min(answered, failed) > READERS


UPLOADS = """
import random, sys, threading, time
from pathlib import Path
from ebbflow.api.v1 import artefact_pb2, artefact_pb2_grpc
from ebbflow.client.channels import sync_channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.common.errors import EbbflowError

address, folder, breaking_s, deadline_s = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
pems = [(folder / name).read_bytes() for name in ("authority_pem", "certificate_pem", "key_pem")]
until_s, ended = time.monotonic() + breaking_s, []

def chunks():
    for _ in range(random.randint(1, 6)):
        yield artefact_pb2.WriteBlobRequest(chunk=bytes(60_000))
        time.sleep(random.random() * 0.02)

def upload():
    while time.monotonic() < until_s:
        with sync_channel(Endpoint(address, *pems)) as channel:
            for _ in range(4):
                try:
                    artefact_pb2_grpc.ArtefactServiceStub(channel).WriteBlob(chunks(), timeout=deadline_s)
                    ended.append(True)
                except EbbflowError:
                    ended.append(False)
                    time.sleep(0.02)

threads = [threading.Thread(target=upload) for _ in range(8)]
for thread in threads:
    thread.start()
print("begun", flush=True)
for thread in threads:
    thread.join()
print(sum(ended), len(ended) - sum(ended))
"""


def test_no_stream_is_repeated() -> None:
    streaming = set()
    for module in pkgutil.iter_modules(ebbflow.api.v1.__path__):
        if module.name.endswith("_pb2"):
            file = import_module(f"ebbflow.api.v1.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                streams = [each for each in service.methods if each.server_streaming or each.client_streaming]
                streaming |= {f"{service.full_name}/{each.name}" for each in streams}
    assert set(STREAMS) == streaming
    config = json.loads(str(dict(ChannelOptions().pairs(STREAMS))["grpc.service_config"]))
    repeated, once = config["methodConfig"]
    assert repeated["name"] == [{}]
    assert {f"{name['service']}/{name['method']}" for name in once["name"]} == streaming
    assert "retryPolicy" not in once


def test_an_upload_begins_again_where_its_line_breaks(live: Any, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(b"x" * 1_500_000)
    breaks = iter([True, True, False])

    def fail(context: Any) -> None:
        if next(breaks, False):
            raise EbbflowError(Reason.SERVER_UNAVAILABLE, "it restarts")

    live.fail = fail
    with AdminClient(live.endpoint()) as client:
        assert client.upload(path).size_bytes == 1_500_000
        live.fail = lambda _: fail_for_good()
        with pytest.raises(EbbflowError) as caught:
            client.upload(path)
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE


def fail_for_good() -> None:
    raise EbbflowError(Reason.SERVER_UNAVAILABLE, "it is gone")
