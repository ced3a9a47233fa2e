"""Disks that fill or fail, files that are torn, clocks that jump: nothing dies, or only what is killed on purpose."""

import errno
import random
import time
from collections.abc import Callable
from pathlib import Path

from faults import invariants
from faults.machine import until
from faults.powercut import Kind
from faults.report import Report
from faults.world import STUDENT, Device, World

from ebbflow.api.v1 import rollout_pb2
from ebbflow.common.errors import EbbflowError, Reason

HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS


def disturb(world: World, chance: random.Random, report: Report) -> None:
    """Draws one disturbance, and brings the next release to every agent in the end."""
    world.chance = chance
    act = chance.choice(DISTURBANCES)
    serving = invariants.slots_of(world.devices[0])["current"]["release"]
    target = chance.choice([number for number in world.files if number != serving])
    act(world, chance, serving, target)
    for machine in world.machines:
        machine.heal()
    world.roll_out(target)  # a rollout of its own: a new chance for what was refused
    invariants.converged(world, target)
    invariants.cloud_is_sound(world)
    report.disturbances[act.__name__.replace("_", " ")] += 1


def _lenient(world: World, target: int) -> None:
    """Rolls out to all at once, whatever they say of it, and waits until all have said something."""
    phase = rollout_pb2.Phase(failure_share=0.9, success_share=0.01, min_answers=len(world.devices))
    world.roll_out(target, [phase])

    def answered() -> bool:
        with world.client() as client:
            found = client.rollouts.GetRollout(rollout_pb2.GetRolloutRequest(name=world.rollout)).rollout
        return bool(found.counts.succeeded + found.counts.failed == len(world.devices))

    until("every answer", answered, 60)


def full_disk_of_an_agent(world: World, chance: random.Random, serving: int, target: int) -> None:
    """It fills in the midst of a download: the old release serves, the cloud hears why."""
    victim = chance.choice(world.devices)
    victim.machine["space_bytes"] = chance.randint(0, 3_000_000)
    _lenient(world, target)
    served = invariants.serves(world, victim, {serving, target})  # the target, if it was small or is still in a slot
    query = "SELECT state, reason FROM rollout_devices WHERE rollout_id = ? AND agent_id = ?"
    rollout = world.rollout.removeprefix("rollouts/")
    found = invariants.rows(world.home / "registry.db", query, rollout, victim.machine.name)
    assert found == [("failed", "DISK_FULL") if served == serving else ("succeeded", "")], found
    invariants.files_are_whole(world, victim)


def failing_disk_of_an_agent(world: World, chance: random.Random, serving: int, target: int) -> None:
    """Some syncs, writes or renames fail, and then the power goes."""
    victim = chance.choice(world.devices)
    machine = victim.machine
    machine["fail_errno"], machine["fail_after"] = errno.EIO, chance.randint(0, 12)
    machine["fail_times"] = chance.randint(1, 3)
    machine["fail_kinds"] = 1 << chance.choice((Kind.SYNC, Kind.SYNC, Kind.WRITE, Kind.RENAME))
    world.roll_out(target)
    time.sleep(chance.uniform(0.5, 2))
    invariants.serves(world, victim, {serving, target})
    if chance.random() < 1 / 2:
        machine.heal()
        machine.cut_power(chance)
        invariants.slots_of(victim)
        _restart(world, victim)
        invariants.serves(world, victim, set(world.files))  # data given up by a failed sync may cost the newest


def full_disk_of_the_cloud(world: World, chance: random.Random, serving: int, target: int) -> None:
    """The registry cannot be written for a while; agents go on serving."""
    world.cloud["space_bytes"] = chance.randint(0, 20_000)
    _quietly(lambda: world.roll_out(target))
    time.sleep(chance.uniform(0.5, 2))
    _look_after_the_cloud(world)
    for device in world.devices:
        invariants.serves(world, device, {serving, target})


def failing_disk_of_the_cloud(world: World, chance: random.Random, serving: int, target: int) -> None:
    """Some syncs or writes of the registry fail, and then the power goes."""
    machine = world.cloud
    world.roll_out(target)
    machine["fail_errno"], machine["fail_after"] = errno.EIO, chance.randint(0, 30)
    machine["fail_times"] = chance.randint(1, 3)
    machine["fail_kinds"] = 1 << chance.choice((Kind.SYNC, Kind.WRITE))
    time.sleep(chance.uniform(0.5, 2))
    _look_after_the_cloud(world)
    if chance.random() < 1 / 2:
        machine.cut_power(chance)
        world.start_cloud()
    invariants.registry_is_sound(world)
    for device in world.devices:
        invariants.serves(world, device, {serving, target})


def torn_pointer(world: World, chance: random.Random, serving: int, target: int) -> None:
    """slots.json is damaged, which no crash does: nothing wrong is served, and the next installation heals it."""
    victim = chance.choice(world.devices)
    victim.machine.kill("agent")
    _spoil(victim.state / "releases" / STUDENT / "slots.json", chance)
    victim.start()
    until(f"the start of {victim.name}", victim.alive)


def torn_partial_file(world: World, chance: random.Random, serving: int, target: int) -> None:
    """What was fetched so far is damaged: it is fetched again."""
    victim = chance.choice(world.devices)
    world.wire.bytes_per_second = 4 << 20
    world.roll_out(target)
    partial = victim.state / "releases" / STUDENT / "partial"
    end_s = time.monotonic() + 3
    while time.monotonic() < end_s and not any(path.stat().st_size > 100_000 for path in partial.glob("*")):
        time.sleep(0.01)
    victim.machine.kill("agent")
    for path in partial.glob("*"):
        _spoil(path, chance)
    world.wire.bytes_per_second = 0
    _restart(world, victim)
    invariants.serves(world, victim, {serving, target})


def torn_weights(world: World, chance: random.Random, serving: int, target: int) -> None:
    """The serving release is damaged on the disk: the one before it serves, without the network."""
    victim = chance.choice(world.devices)
    victim.machine.kill("agent")
    slots = invariants.slots_of(victim)
    name, what = slots["current"]["name"], chance.choice(sorted(invariants.FILES.values()))
    path = victim.state / "releases" / STUDENT / name / what
    content = path.read_bytes()
    path.unlink()  # the other slot may hold the same file by another name
    path.write_bytes(content)
    _spoil(path, chance)
    before = slots["previous"]
    world.wire.cut()
    try:
        _restart(world, victim)
        if before:
            invariants.serves(world, victim, {before["release"]})
    finally:
        world.wire.join()


def torn_records_of_an_agent(world: World, chance: random.Random, serving: int, target: int) -> None:
    """The log of the agent's database ends in noise, as an unfinished write leaves it."""
    victim = chance.choice(world.devices)
    victim.machine.kill("agent")
    _append_noise(victim.state / "agent.db-wal", chance)
    _restart(world, victim)
    invariants.serves(world, victim, {serving})
    invariants.ledgers_agree(world)


def torn_registry_log(world: World, chance: random.Random, serving: int, target: int) -> None:
    """The log of the registry ends in noise, as an unfinished write leaves it."""
    world.roll_out(target)
    time.sleep(chance.uniform(0, 0.5))
    world.cloud.kill_all()
    _append_noise(world.home / "registry.db-wal", chance)
    world.start_cloud()
    invariants.cloud_is_sound(world)


def clock_of_an_agent_jumps(world: World, chance: random.Random, serving: int, target: int) -> None:
    """Ahead: signatures look expired, which stops installing, never serving. Back: nothing connects, and all serve."""
    victim = chance.choice(world.devices)
    victim.machine["clock_ns"] = chance.choice((3 * DAY_NS, 40 * DAY_NS, -3 * HOUR_NS, -4000 * DAY_NS))
    if chance.random() < 1 / 2:
        victim.machine.kill("agent")
        _restart(world, victim)
    world.roll_out(target)
    time.sleep(chance.uniform(0.5, 2))
    invariants.serves(world, victim, {serving, target})


def clock_of_the_cloud_jumps(world: World, chance: random.Random, serving: int, target: int) -> None:
    """By hours, ahead or back: leases, soak and signatures go on.

    The rollout begins before the jump: to a clock that is hours back, certificates of today are not valid yet.
    """
    world.roll_out(target)
    time.sleep(chance.uniform(0, 0.5))
    world.cloud["clock_ns"] = chance.choice((13, 2, -1, -5)) * HOUR_NS
    time.sleep(chance.uniform(0.5, 2))
    invariants.registry_is_sound(world)


def _restart(world: World, device: Device) -> None:
    if "agent" not in device.machine.pids:
        device.start()
    until(f"the start of {device.name}", device.alive)


def _look_after_the_cloud(world: World) -> None:
    """Ends the disturbance; what has ended meanwhile is started again, as its supervisor does."""
    world.cloud.heal()
    for process in list(world.cloud.pids):
        world.cloud.ended(process)
    world.start_cloud()


def _quietly(act: Callable[[], object]) -> None:
    try:
        act()
    except EbbflowError as error:
        if error.reason not in {Reason.DISK_FULL, Reason.DATABASE_UNAVAILABLE, Reason.SERVER_UNAVAILABLE}:
            raise


def _spoil(path: Path, chance: random.Random) -> None:
    """Truncates, zeroes or scrambles the tail of a file."""
    size = path.stat().st_size
    begin = chance.randrange(size) if size else 0
    length = size - begin
    tail = chance.choice((b"", bytes(length), chance.randbytes(length)))
    with path.open("r+b") as file:
        file.seek(begin)
        file.truncate()
        file.write(tail)


def _append_noise(log: Path, chance: random.Random) -> None:
    with log.open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 20_000)))


DISTURBANCES = (
    full_disk_of_an_agent,
    failing_disk_of_an_agent,
    full_disk_of_the_cloud,
    failing_disk_of_the_cloud,
    torn_pointer,
    torn_partial_file,
    torn_weights,
    torn_records_of_an_agent,
    torn_registry_log,
    clock_of_an_agent_jumps,
    clock_of_the_cloud_jumps,
)
