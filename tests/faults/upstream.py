"""Kills worker, gate and server while releases are made and published."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from faults import invariants
from faults.machine import until
from faults.releases import Maker
from faults.report import Report, place_of
from faults.world import DISTILLED, PACKED, PROCESSES, World

from ebbflow.api.v1 import distillation_pb2
from ebbflow.common.errors import EbbflowError

PUBLISH_OPERATIONS = 60
"""File operations of worker, gate and server from a packed to a published release, as counted without disturbance."""
ENDED = {
    distillation_pb2.Distillation.STATE_SUCCEEDED,
    distillation_pb2.Distillation.STATE_FAILED,
    distillation_pb2.Distillation.STATE_CANCELLED,
}


@dataclass
class Reference:
    """What a distillation gives when nobody disturbs it."""

    sha256s: dict[str, str]
    length_s: float
    operations: int


def weights_of(world: World, number: int) -> dict[str, str]:
    """Hashes of a release's files by kind, without the manifest, which holds its number."""
    query = "SELECT json_each.value ->> '$.kind', json_each.value ->> '$.sha256' FROM releases, json_each(targets)"
    found = invariants.rows(
        world.home / "registry.db", f"{query} WHERE student_id = ? AND number = ?", DISTILLED, number
    )
    return {kind: sha256 for kind, sha256 in found if kind != "manifest"}


def learn(world: World) -> Reference:
    """Distils once without disturbance."""
    begin_s, before = time.monotonic(), world.cloud["operations"]
    job = world.distil()
    until("the distillation", lambda: world.job(job).state in ENDED, every_s=0.05)
    length_s, operations = time.monotonic() - begin_s, world.cloud["operations"] - before
    number = _released(world, job)
    until("publication", lambda: number in world.published(DISTILLED))
    return Reference(weights_of(world, number), length_s, operations)


def _released(world: World, job: str) -> int:
    found = world.job(job)
    assert found.state == distillation_pb2.Distillation.STATE_SUCCEEDED, f"{job}: {found.error}"
    return int(found.release.rpartition("/")[2])


def publish(world: World, chance: random.Random, report: Report) -> None:
    """Publishes a packed release while the processes that sign it are killed at drawn steps."""
    number = len(invariants.rows(world.home / "registry.db", "SELECT 1 FROM releases WHERE student_id = ?", PACKED)) + 1
    world.insert(PACKED, number, Maker(world.folder, layers=1).make(world.blobs, PACKED, number))
    steps = [chance.randint(1, PUBLISH_OPERATIONS) for _ in range(chance.randint(2, 4))]
    _strike(world, chance, report, "publish", steps, lambda: number in world.published(PACKED))
    until("publication", lambda: number in world.published(PACKED), 120)
    invariants.cloud_is_sound(world)
    report.episodes["publish"] += 1


def distil(world: World, chance: random.Random, report: Report, reference: Reference) -> None:
    """Distils while the worker and whoever else is at it are killed; the same weights come out, once."""
    job = world.distil()
    steps = [chance.randint(1, reference.operations) for _ in range(chance.randint(0, 2))]
    for _ in range(chance.randint(1, 3)):
        time.sleep(chance.uniform(0, reference.length_s))
        _count(world, report, "distil", "work", kill=True)
        world.start_cloud()
    _strike(world, chance, report, "distil", steps, lambda: world.job(job).state in ENDED)
    until("the distillation", lambda: world.job(job).state in ENDED, 120, every_s=0.05)
    number = _released(world, job)
    assert weights_of(world, number) == reference.sha256s, "a distillation that was killed made other weights"
    until("publication", lambda: number in world.published(DISTILLED), 120)
    invariants.cloud_is_sound(world)
    report.episodes["distillation"] += 1


def _strike(
    world: World, chance: random.Random, report: Report, what: str, steps: list[int], done: Callable[[], bool]
) -> None:
    """Arms one step after the other, until all have come or the work is done."""
    machine = world.cloud
    for step in steps:
        machine["kill_at"] = machine["operations"] + step
        end_s = time.monotonic() + 20
        while not (victim := _dead(world)) and time.monotonic() < end_s:
            if "serve" in machine.pids and _is(done):
                break
            time.sleep(0.02)
        machine["kill_at"] = 0
        if not victim:
            victim = _dead(world)
        if not victim:
            report.missed += 1
            continue
        _count(world, report, what, victim)
        if chance.random() < 1 / 3:
            report.power_cuts += 1
            report.lost += len(machine.cut_power(chance))
        world.start_cloud()
        invariants.registry_is_sound(world)


def _is(done: Callable[[], bool]) -> bool:
    """Whether the work is done, as far as a cloud that may be dying says."""
    try:
        return done()
    except EbbflowError:
        return False


def _dead(world: World) -> str:
    """Name of a process that the shim has ended, or nothing."""
    for process in [name for name in PROCESSES if name in world.cloud.pids]:
        status = world.cloud.ended(process)
        if status is not None:
            assert status == -signal.SIGKILL, f"{process}: {status}\n{world.cloud.tail(process)}"
            return process
    return ""


def _count(world: World, report: Report, what: str, process: str, *, kill: bool = False) -> None:
    if kill:
        world.cloud.kill(process)
    last = None
    for last in world.cloud.operations():  # noqa: B007 - only the last one is wanted
        pass
    report.kills[f"{what}, cloud {process}: {place_of(last, world.cloud.disk)}"] += 1
