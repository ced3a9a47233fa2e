"""Devices that are killed with SIGKILL at every point of an installation, as real processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from delivery_world import World

ZYGOTE = Path(__file__).parents[2] / "delivery_zygote.py"


class Zygote:
    """Forks one device after the other."""

    def __init__(self, world: World) -> None:
        endpoint = world.endpoint()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, str(ZYGOTE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._tell(
            address=endpoint.address,
            root=world.root.decode(),
            authority_pem=endpoint.authority_pem.decode(),
            certificate_pem=(endpoint.certificate_pem or b"").decode(),
            key_pem=(endpoint.key_pem or b"").decode(),
        )

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            stream.close()
        self._process.wait(30)

    def install(self, folder: Path, number: int, *, kill_at: int = 0, kill_after_s: float = 600) -> int:
        """Runs a device until it is killed or done, and returns its status: 0 or -SIGKILL."""
        self._tell(folder=str(folder), number=number, kill_at=kill_at, kill_after_s=kill_after_s)
        assert self._process.stdout
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))

    def _tell(self, **fields: Any) -> None:
        assert self._process.stdin
        print(json.dumps(fields), file=self._process.stdin, flush=True)


@pytest.fixture
def zygote(world: World) -> Iterator[Zygote]:
    for number in (1, 2, 3):
        world.publish(number, padding_bytes=600_000)
    for number in (1, 2):
        world.device("template").install(number)
    made = Zygote(world)
    yield made
    made.close()


def check_and_recover(world: World) -> None:
    """Whatever happened to the device: it serves 2, or 3 if it got that far; then it installs 3 as if nothing was."""
    assert world.device("killed").serving() in {2, 3}
    world.device("killed").install(3)
    assert world.device("killed").serving() == 3
    home = world.folder / "killed" / "students" / "faq"
    assert {path.name for path in home.iterdir()} <= {"a", "b", "partial", "slots.json"}
    assert not list((home / "partial").iterdir())
    assert len(list(home.rglob("*.safetensors"))) <= 2
    trust = {path.name for path in (world.folder / "killed" / "trust").iterdir()}
    assert trust <= {
        "root_history",
        "root.json",
        "timestamp.json",
        "snapshot.json",
        "targets.json",
        "student.json",
        "clock",
    }


def fresh(world: World) -> Path:
    folder = world.folder / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.folder / "template", folder, symlinks=True)
    return folder


def kill_points(world: World, zygote: Zygote, points: Iterator[int]) -> int:
    killed = 0
    for point in points:
        status = zygote.install(fresh(world), 3, kill_at=point)
        assert status in {0, -signal.SIGKILL}
        check_and_recover(world)
        if status == 0:
            break
        killed += 1
    return killed


def test_a_device_that_is_killed_in_the_middle_of_a_transfer_goes_on_where_it_was(world: World, zygote: Zygote) -> None:
    folder = fresh(world)

    def slowly(_: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            for begin in range(0, len(chunk), 1 << 12):
                time.sleep(0.01)
                yield chunk[begin : begin + (1 << 12)]

    world.faults.answer = slowly
    status = zygote.install(folder, 3, kill_after_s=1.5)
    assert status == -signal.SIGKILL
    there = sum(path.stat().st_size for path in folder.glob("students/faq/partial/*"))
    assert there > 1 << 14
    world.faults.answer = None
    offsets = len(world.faults.offsets)
    assert world.device("killed").serving() == 2
    installed = world.device("killed").install(3)
    assert installed.resumed_bytes == there
    assert max(world.faults.offsets[offsets:]) == there
    assert world.device("killed").serving() == 3


def test_killed_before_some_of_its_file_operations(world: World, zygote: Zygote) -> None:
    assert kill_points(world, zygote, iter(range(3, 10_000, 9))) > 5


@pytest.mark.slow
def test_killed_before_every_one_of_its_file_operations(world: World, zygote: Zygote) -> None:
    assert kill_points(world, zygote, iter(range(1, 10_000))) > 50


@pytest.mark.slow
def test_killed_at_random_times_again_and_again(world: World, zygote: Zygote) -> None:
    """The same device is killed many times, and the next release begins wherever the last one was torn."""
    chance = random.Random(7)
    folder, kills = fresh(world), 0
    for number in range(4, 34):
        world.publish(number, padding_bytes=2_000_000)
        for _ in range(2):
            status = zygote.install(folder, number, kill_after_s=chance.uniform(0, 0.25))
            assert status in {0, -signal.SIGKILL}
            kills += status != 0
            assert world.device("killed").serving() in {2, *range(4, number + 1)}
    assert kills > 20
    world.device("killed").install(33)
    assert world.device("killed").serving() == 33
