"""Links and processes as they are: slow, limited, killed in the middle and started again."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from delivery_world import World
from deploy_world import free_port
from slow_link import Link

from ebbflow.client.channels import sync_channel
from ebbflow.common.rpc.options import ChannelOptions
from ebbflow.edge.delivery.download import Downloader, Patience
from ebbflow.edge.delivery.fetcher import ArtefactSource
from ebbflow.edge.delivery.files import SignedFile
from ebbflow.edge.delivery.traffic import Brake, Traffic, TransferPausedError

SERVE = Path(__file__).parents[2] / "delivery_serve.py"
SILENCE_S = 2.0


@pytest.fixture
def link(world: World) -> Iterator[Link]:
    made = Link(world.port)
    yield made
    made.close()


def blob(world: World, size_bytes: int) -> SignedFile:
    stored = world.blobs.put([os.urandom(size_bytes)])
    return SignedFile(stored.sha256, stored.size_bytes)


def downloader(world: World, address: str, traffic: Traffic | None = None, brake: Brake | None = None) -> Downloader:
    read_ahead_bytes = traffic.chunk_bytes if traffic else 0
    options = ChannelOptions(read_ahead_bytes=read_ahead_bytes)
    channel = sync_channel(replace(world.endpoint(), address=address), options)
    source = ArtefactSource(channel, SILENCE_S)
    return Downloader(source, world.folder / "partial", Patience(attempts=40), traffic=traffic, brake=brake)


def whole(path: Path, file: SignedFile) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def test_a_link_of_64_kib_a_second_is_slow_and_nothing_else(world: World, link: Link) -> None:
    """The whole takes several times as long as a silence may."""
    link.rate = 1 << 16
    file, path = blob(world, 5 << 16), world.folder / "file"
    fetching, begin_s = downloader(world, link.address), time.monotonic()
    fetching.download(file, path)
    assert time.monotonic() - begin_s > 2 * SILENCE_S
    assert whole(path, file)
    assert fetching.fetched_bytes == file.size_bytes
    assert world.faults.offsets == [0]


@pytest.mark.slow
def test_a_link_too_slow_for_long_messages_gets_short_ones(world: World, link: Link) -> None:
    """One message as long as the server likes takes longer than a silence may."""
    link.rate, world.faults.piece_bytes = 1 << 16, 1 << 20
    file, path = blob(world, 5 << 16), world.folder / "file"
    downloader(world, link.address).download(file, path)
    assert whole(path, file)


@pytest.mark.parametrize("rate", [1 << 16, 1 << 19])
def test_no_second_carries_more_than_the_limit(world: World, link: Link, rate: int) -> None:
    file, path = blob(world, 3 * rate), world.folder / "file"
    fetching, begin_s = downloader(world, link.address, Traffic(rate)), time.monotonic()
    fetching.download(file, path)
    took_s = time.monotonic() - begin_s
    assert whole(path, file)
    assert took_s > 2.5
    # gRPC reads ahead by its window of 64 KiB, TLS and HTTP/2 add a little.
    assert link.most_in(1.0) < 1.1 * (1.125 * rate + fetching_chunk(rate)) + (1 << 16)
    assert world.faults.offsets == [0]


def fetching_chunk(rate: int) -> int:
    return Traffic(rate).chunk_bytes


def test_a_limit_far_below_the_link_never_looks_like_silence(world: World, link: Link) -> None:
    file, path = blob(world, 24_000), world.folder / "file"
    fetching, begin_s = downloader(world, link.address, Traffic(4000)), time.monotonic()
    fetching.download(file, path)
    assert time.monotonic() - begin_s > 2 * SILENCE_S
    assert whole(path, file)
    assert world.faults.offsets == [0]


def test_a_brake_stops_a_transfer_that_waits_for_its_limit(world: World, link: Link) -> None:
    file, brake = blob(world, 1 << 20), Brake()
    fetching = downloader(world, link.address, Traffic(1000), brake)
    threading.Timer(1.0, brake.pull).start()
    with pytest.raises(TransferPausedError) as caught:
        fetching.download(file, world.folder / "file")
    assert caught.value.braked
    assert (world.folder / "partial" / file.sha256).stat().st_size == fetching.fetched_bytes > 0
    assert fetching.fetched_bytes < file.size_bytes // 10, "the whole takes a quarter of an hour"


class Server:
    """The cloud as a process of its own."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.port = free_port()

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, str(SERVE), str(self._world.folder), str(self._world.folder.parent / "blobs")]
        self.process = subprocess.Popen(
            [*command, str(self.port), "0.005"], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)
        assert self.process.stdout
        self.process.stdout.close()


def test_a_server_process_that_is_killed_twice_in_the_middle_only_delays(world: World) -> None:
    server = Server(world)
    server.start()
    file, path = blob(world, 3 << 20), world.folder / "file"
    fetching = downloader(world, f"localhost:{server.port}")
    partial = fetching.partial_path(file)

    kills, over = 0, threading.Event()

    def trouble() -> None:
        nonlocal kills
        for share in (0.3, 0.6):
            while not partial.exists() or partial.stat().st_size < share * file.size_bytes:
                if path.exists() or over.is_set():
                    return
                time.sleep(0.005)
            server.kill()
            kills += 1
            time.sleep(0.5)
            server.start()

    troubled = threading.Thread(target=trouble)
    troubled.start()
    try:
        fetching.download(file, path)
    finally:
        over.set()
        troubled.join()
        server.kill()
    assert kills == 2
    assert whole(path, file)
    assert fetching.fetched_bytes == file.size_bytes
