"""What must hold after every kill, read from the disks and asked of the running processes."""

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.machine import until
from faults.releases import sha256_of
from faults.world import DISTILLED, PACKED, STUDENT, Device, World

from ebbflow.api.v1 import rollout_pb2

FILES = {"manifest": "manifest.json", "tokenizer": "tokenizer.json", "weights": "weights.safetensors"}
UNFINISHED = ("running", "paused", "halted", "waiting_for_approval")


@contextlib.contextmanager
def reading(database: Path) -> Iterator[sqlite3.Connection]:
    """A database as it is on the disk, its log included."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=20)
    try:
        yield connection
    finally:
        connection.close()


def rows(database: Path, query: str, *values: object) -> list[Any]:
    """Rows of a query."""
    with reading(database) as connection:
        return connection.execute(query, values).fetchall()


def slots_of(device: Device) -> dict[str, Any]:
    """The pointer of a device, which must be whole."""
    path = device.state / "releases" / STUDENT / "slots.json"
    slots: dict[str, Any] = json.loads(path.read_bytes())
    assert {"format", "current", "previous", "pending"} <= set(slots), slots
    return slots


def files_are_whole(world: World, device: Device) -> None:
    """What the pointer calls current and previous hashes to what was signed, byte for byte."""
    slots = slots_of(device)
    for which in ("current", "previous"):
        slot = slots[which]
        if slot is None:
            assert which == "previous", f"{device.name} has lost its release"
            continue
        signed = world.files[slot["release"]].sha256s
        folder = device.state / "releases" / STUDENT / slot["name"]
        for what, name in FILES.items():
            found = sha256_of(folder / name)
            assert found == signed["int8" if what == "weights" else what], f"{device.name}: {which} {what} is torn"
    if slots["current"] and slots["previous"]:
        assert slots["current"]["name"] != slots["previous"]["name"]


def serves(world: World, device: Device, allowed: set[int]) -> int:
    """The device answers exactly as one of these releases does, whole; returns which."""
    number, answers = device.answer()
    assert number in allowed, f"{device.name} serves {number}, not one of {allowed}"
    assert answers == world.answers[number], f"{device.name} does not answer as release {number} does"
    return number


def told(world: World, device: Device) -> int | None:
    """The release that the cloud has heard the device serves."""
    query = "SELECT serving_number FROM assignments WHERE agent_id = ? AND student_id = ?"
    found = rows(world.home / "registry.db", query, device.machine.name, STUDENT)
    return int(found[0][0]) if found and found[0][0] is not None else None


def registry_is_sound(world: World) -> None:
    """Nothing is lost, nothing is there twice."""
    database = world.home / "registry.db"
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]
    assert rows(database, "PRAGMA foreign_key_check") == []
    agents = {device.machine.name for device in world.devices}
    assigned = [row[0] for row in rows(database, "SELECT agent_id FROM assignments WHERE student_id = ?", STUDENT)]
    assert Counter(assigned) == Counter(agents), assigned
    _rollouts_are_sound(world, database, agents)
    _releases_are_sound(database)
    _blobs_are_whole(world, database)
    _metadata_is_sound(database)
    _ledger_is_sound(database)


def _rollouts_are_sound(world: World, database: Path, agents: set[str]) -> None:
    running = rows(database, f"SELECT id FROM rollouts WHERE state IN {UNFINISHED} AND student_id = ?", STUDENT)
    assert len(running) <= 1, f"two rollouts at once: {running}"
    last = "SELECT id, release_number, state FROM rollouts WHERE id = ? AND state NOT IN ('superseded', 'aborted')"
    (rollout, number, state), *_ = rows(database, last, world.rollout.removeprefix("rollouts/")) or [("", 0, "")]
    if not rollout:
        return
    query = (
        "SELECT d.agent_id, d.state, d.previous_number, a.desired_number FROM rollout_devices d JOIN assignments a "
        "ON a.agent_id = d.agent_id AND a.student_id = ? WHERE d.rollout_id = ?"
    )
    devices = rows(database, query, STUDENT, rollout)
    assert Counter(row[0] for row in devices) == Counter(agents), devices
    for agent, device, previous, desired in devices:
        assert desired in {number, previous}, f"{agent} is to serve {desired}, neither {number} nor {previous}"
        if device in {"assigned", "succeeded"} and state in {"running", "succeeded"}:
            assert desired == number, f"{agent} has {device} but is to serve {desired}"


def _releases_are_sound(database: Path) -> None:
    made = rows(database, "SELECT student_id, number, distillation_id FROM releases ORDER BY student_id, number")
    for student in (STUDENT, DISTILLED, PACKED):
        numbers = [number for of, number, _ in made if of == student]
        assert numbers == list(range(1, len(numbers) + 1)), f"releases of {student}: {numbers}"
    ended = rows(database, "SELECT id, student_id, release_number FROM distillations WHERE state = 'succeeded'")
    assert Counter((job, of, number) for of, number, job in made) == Counter(ended), "not one release per distillation"


def _blobs_are_whole(world: World, database: Path) -> None:
    """Every file of every release is there, in its whole length; devices and the gate hash them anyway."""
    for student, number, targets in rows(database, "SELECT student_id, number, targets FROM releases"):
        for path, file in json.loads(targets).items():
            blob = world.home / "blobs" / file["sha256"][:2] / file["sha256"]
            size = blob.stat().st_size if blob.exists() else None
            assert size == file["size_bytes"], f"{path} of release {number} of {student} has {size} bytes in the store"


def _metadata_is_sound(database: Path) -> None:
    query = "SELECT role, version FROM trust_metadata WHERE published ORDER BY role, version"
    versions: dict[str, list[int]] = {}
    for role, version in rows(database, query):
        versions.setdefault(role, []).append(version)
    assert len(versions["timestamp"]) == 1
    for role in ("root", "targets", "student", "snapshot"):
        found = versions[role]
        assert found == list(range(found[0], found[0] + len(found))), f"gaps in {role}: {found}"
    waiting = rows(database, "SELECT version FROM trust_metadata WHERE NOT published AND role = 'student'")
    assert len(waiting) <= 1, f"two proposals at once: {waiting}"


def _ledger_is_sound(database: Path) -> None:
    spent = "SELECT agent_id, student_id, window, rho_spent_nano FROM privacy_accounts"
    charged = "SELECT agent_id, student_id, window, SUM(rho_nano) FROM privacy_entries GROUP BY 1, 2, 3"
    assert sorted(rows(database, spent)) == sorted(rows(database, charged))
    kept = rows(database, "SELECT round_id, agent_id FROM feedback_batches")
    assert Counter(kept) == Counter(rows(database, "SELECT round_id, agent_id FROM privacy_entries"))
    assert all(count == 1 for count in Counter(kept).values())


def ledgers_agree(world: World) -> None:
    """Every agent has charged itself at least what the cloud knows of, and each round once."""
    mirrored = rows(world.home / "registry.db", "SELECT agent_id, batch_id, rho_nano FROM privacy_entries")
    for device in world.devices:
        own = rows(device.state / "agent.db", "SELECT batch_id, rho_nano, round FROM entries")
        assert all(count == 1 for count in Counter(row[2] for row in own).values()), own
        charged = {(batch, rho) for batch, rho, _ in own}
        assert {(batch, rho) for agent, batch, rho in mirrored if agent == device.machine.name} <= charged
        waiting = rows(device.state / "agent.db", "SELECT batch_id, round FROM outbox")
        assert set(waiting) <= {(batch, round_) for batch, _, round_ in own}


def cloud_is_sound(world: World) -> None:
    """The registry holds together, and a client that has seen everything accepts what is published."""
    registry_is_sound(world)
    with world.client() as client:
        student = world.observer.look(client)
    for number, files in world.files.items():
        for path, file in files.targets.items():
            assert student.targets[path].hashes == {"sha256": file["sha256"]}, f"release {number}: {path}"


def converged(world: World, number: int) -> None:
    """The rollout has succeeded, its counts are those of its rows, and every agent serves the release."""
    until(f"the rollout of {number}", lambda: world.arrived(number), 120)
    with world.client() as client:
        found = client.rollouts.GetRollout(rollout_pb2.GetRolloutRequest(name=world.rollout)).rollout
    query = "SELECT state, COUNT(*) FROM rollout_devices WHERE rollout_id = ? GROUP BY state"
    counted = dict(rows(world.home / "registry.db", query, world.rollout.removeprefix("rollouts/")))
    said = {state: getattr(found.counts, state) for state in ("waiting", "assigned", "succeeded", "failed")}
    assert {state: count for state, count in said.items() if count} == counted
    for device in world.devices:
        serves(world, device, {number})
        files_are_whole(world, device)
