"""Synchronous streams over a line that breaks at any moment: each one ends, with its answers or with an error."""

import contextlib
import json
import pkgutil
import random
import threading
import time
from dataclasses import replace
from importlib import import_module
from typing import Any

import grpc
import pytest
from faults.proxy import Wire

import ebbflow.api.v1
from ebbflow.api.v1 import artefact_pb2, artefact_pb2_grpc
from ebbflow.client.channels import ANSWER_STREAMS, sync_channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.common.errors import EbbflowError
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


def test_no_stream_of_answers_is_repeated_on_a_synchronous_channel() -> None:
    streaming = set()
    for module in pkgutil.iter_modules(ebbflow.api.v1.__path__):
        if module.name.endswith("_pb2"):
            file = import_module(f"ebbflow.api.v1.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                streaming |= {f"{service.full_name}/{each.name}" for each in service.methods if each.server_streaming}
    assert set(ANSWER_STREAMS) == streaming
    config = json.loads(str(dict(ChannelOptions().pairs(ANSWER_STREAMS))["grpc.service_config"]))
    repeated, once = config["methodConfig"]
    assert repeated["name"] == [{}]
    assert {f"{name['service']}/{name['method']}" for name in once["name"]} == streaming
    assert "retryPolicy" not in once
