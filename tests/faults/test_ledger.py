"""The privacy account on a disk that tears, in a process that dies, in two processes at once, and set back.

What has left the device is written outside the simulated disk as it leaves. Whatever happens to the disk after that,
the charge is there, the bytes are the same, and the books add up.
"""

import datetime as dt
import hashlib
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_world import environment
from faults import powercut
from faults.disks import act
from faults.machine import compile_shim

from ebbflow.edge.feedback.store import FeedbackStore

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)
COST = 1_000
POINTS = 8
"""Moments at which a device is disturbed in the quick tests."""
DISKS_AT_ONCE = 100
VERSION_1 = Path(__file__).parents[1] / "unit" / "feedback_edge" / "agent_1.sql"
OLD = {f"rounds/r{number}" for number in range(10, 15)}
"""Rounds that a store of version 0.1 was charged for."""
BEFORE = """
import datetime as dt, hashlib, os
from pathlib import Path
from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.store import FeedbackStore

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)

def plan(number):
    mechanism = pb.Mechanism(
        kind=1, sigma_squared_numerator=4, sigma_squared_denominator=1, sensitivity_squared=1, rho_nano=1_000
    )
    policy = pb.PrivacyPolicy(epsilon=4.0, delta=1e-6, window_days=30, rho_cap_nano=10**9)
    made = pb.RoundPlan(
        round=f"rounds/r{number}", student="students/faq", bins=[pb.Bin(bin_id="files", texts=["files"])], null_bins=64,
        mechanism=mechanism, policy=policy, window="2026-11-03", max_users=9,
    )
    made.end_time.FromDatetime(NOW + dt.timedelta(days=1))
    digest = hashlib.sha256(made.SerializeToString()).digest()
    return AdmittedPlan(made, digest, "2026-11-03", 10**9, 1)

PLANS = [plan(number) for number in range(8)]

def leave(data, number):
    with open("../left", "a") as file:
        file.write(f"rounds/r{number} {hashlib.sha256(data).hexdigest()}\\n")

def answer(numbers, store=None):
    store = store or FeedbackStore(Path("agent.db"))
    for number in numbers:
        leave(store.release_batch(PLANS[number], [Contribution(0)], lambda data: b"", NOW), number)
    return store
"""
ANSWER = "answer(range(6))"
MIRROR = """
store = answer([0, 1])
charges = [pb.MirroredCharge(round=f"rounds/x{n}", student="students/faq", window="2026-11-03", rho_nano=1_000)
           for n in range(3)]
for charge in charges:
    charge.end_time.FromDatetime(NOW)
store.take_over(charges, NOW)
leave(b"taken over", "taken")
answer([2], store)
"""
SETTLE = """
store = answer([0, 1, 2])
for waiting in store.pending(NOW)[:2]:
    store.mark_sent(waiting.batch_id)
store.apply_retention(NOW + dt.timedelta(days=20))
answer([3], store)
store.close()
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(tmp_path_factory.mktemp("shim"))


def left(folder: Path) -> dict[str, str]:
    """What has left the device, by round; a round that left twice did so with the same bytes."""
    lines = (folder / "left").read_text().split("\n")[:-1] if (folder / "left").exists() else []
    found = [tuple(line.split()) for line in lines]
    assert len(set(found)) == len({round_ for round_, _ in found}), "a round left with two kinds of noise"
    return dict(found)  # type: ignore[arg-type]


def lost_charges(folder: Path) -> set[str]:
    """Rounds that have left the device and that it was not charged for."""
    store = FeedbackStore(folder / "files" / "agent.db")
    lost = {round_ for round_ in left(folder) if round_ != "rounds/rtaken" and not store.has_answered(round_)}
    store.close()
    return lost


def check(folder: Path) -> int:
    """Holds the books of a disk against what had left it; returns the number of charges."""
    gone = left(folder)
    assert not lost_charges(folder)
    connection = sqlite3.connect(folder / "files" / "agent.db")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        entries = dict(connection.execute("SELECT round, rho_nano FROM entries").fetchall())
        own = {row[0] for row in connection.execute("SELECT round FROM entries WHERE batch_id IS NOT NULL")}
        kept = dict(connection.execute("SELECT round, signed_batch FROM outbox").fetchall())
        plans = {row[0] for row in connection.execute("SELECT round FROM plans")}
    finally:
        connection.close()
    assert all(cost == COST for round_, cost in entries.items() if round_ not in OLD)
    assert not (OLD & own) or own >= OLD
    assert kept.keys() <= own
    assert own <= plans | OLD
    if "rounds/rtaken" in gone:
        assert {f"rounds/x{number}" for number in range(3)} <= entries.keys()
    for round_, digest in gone.items():
        if round_ != "rounds/rtaken":
            assert round_ in own
            assert round_ not in kept or hashlib.sha256(kept[round_]).hexdigest() == digest
    return len(entries)


def operations(folder: Path, shim: Path, orders: str) -> int:
    """Counts the operations on the disk that orders take, undisturbed."""
    assert act([folder], shim, orders, before=BEFORE) == [0]
    return int.from_bytes((folder / "control").read_bytes()[:8], "little", signed=True)


def disturb(folder: Path, shim: Path, orders: str, points: list[int], *, cut: bool) -> int:
    """Kills the device before each of these operations, perhaps with the power; returns how many charges were found."""
    disks = [folder / f"{number}-{point}" for number, point in enumerate(points)]
    codes: list[int] = []
    for first in range(0, len(disks), DISKS_AT_ONCE):
        some = slice(first, first + DISKS_AT_ONCE)
        codes += act(disks[some], shim, orders, [{"kill_at": point} for point in points[some]], BEFORE)
    assert set(codes) <= {0, -9}
    assert -9 in codes
    found = 0
    for seed, disk in enumerate(disks):
        if cut:
            powercut.cut(disk / "files", disk / "journal", random.Random(seed))
        found += check(disk)
    return found


@pytest.mark.parametrize("orders", [ANSWER, MIRROR, SETTLE])
@pytest.mark.parametrize("cut", [False, True])
def test_no_charge_that_has_left_is_lost(tmp_path: Path, shim: Path, orders: str, *, cut: bool) -> None:
    opened = operations(tmp_path / "opened", shim, "FeedbackStore(Path('agent.db'))")
    most = operations(tmp_path / "count", shim, orders)
    points = sorted(random.Random(orders).sample(range(opened, most + 1), POINTS))
    assert disturb(tmp_path, shim, orders, points, cut=cut) > 0


@pytest.mark.parametrize("orders", [ANSWER, MIRROR, SETTLE])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.faults)])
def test_at_every_operation_no_charge_that_has_left_is_lost(
    tmp_path: Path, shim: Path, orders: str, times: int, *, cut: bool
) -> None:
    most = operations(tmp_path / "count", shim, orders)
    assert disturb(tmp_path, shim, orders, [*range(1, most + 1)] * times, cut=cut) > times * most // 3


def write_version_1(folder: Path) -> None:
    """Writes a store as version 0.1 left it, durably; its rounds are numbered from 10 on."""
    (folder / "files").mkdir(parents=True)
    text = VERSION_1.read_text()
    for number in range(5):
        text = text.replace(f"'rounds/r{number}'", f"'rounds/r1{number}'")
    connection = sqlite3.connect(folder / "files" / "agent.db")
    connection.executescript(f"PRAGMA journal_mode=WAL;{text}")
    connection.close()


@pytest.mark.parametrize("cut", [False, True])
def test_an_upgrade_that_is_cut_off_loses_nothing(tmp_path: Path, shim: Path, *, cut: bool) -> None:
    write_version_1(tmp_path / "count")
    most = operations(tmp_path / "count", shim, "answer([0])")
    points = random.Random(0).sample(range(1, most + 1), POINTS)
    for number, point in enumerate(points):
        write_version_1(tmp_path / f"{number}-{point}")
    assert disturb(tmp_path, shim, "answer([0])", points, cut=cut) >= POINTS * len(OLD)


def test_a_store_that_does_not_wait_for_the_disk_is_found(tmp_path: Path, shim: Path) -> None:
    """What these tests would say of a build that charges without `synchronous=FULL`."""
    hasty = "import ebbflow.edge.feedback.store as module\nreal = module.Database\n"
    hasty += "module.Database = lambda path, _: real(path, 'NORMAL')\n"
    disks = [tmp_path / str(seed) for seed in range(POINTS)]
    act(disks, shim, ANSWER, before=BEFORE + hasty)
    lost = 0
    for seed, disk in enumerate(disks):
        powercut.cut(disk / "files", disk / "journal", random.Random(seed))
        lost += bool(lost_charges(disk))
    assert lost


RACE = """
import random, sys
numbers = list(range(8)) * 3
random.Random(int(sys.argv[1])).shuffle(numbers)
store = FeedbackStore(Path("agent.db"))
sys.stdin.readline()
for number in numbers:
    answer([number], store)
"""


@pytest.mark.parametrize("processes", [3])
def test_processes_that_race_charge_once_and_send_the_same_bytes(tmp_path: Path, processes: int) -> None:
    (tmp_path / "files").mkdir()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", BEFORE + RACE, str(seed)],
            cwd=tmp_path / "files",
            env=environment({}),
            stdin=subprocess.PIPE,
        )
        for seed in range(processes)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(b"\n")
        racer.stdin.close()
    assert [racer.wait(60) for racer in racers] == [0] * processes
    assert check(tmp_path) == 8
    assert len(left(tmp_path)) == 8


@pytest.mark.parametrize("age", [0, 3])
def test_a_disk_that_was_set_back_charges_anew_only_what_never_left(tmp_path: Path, age: int, shim: Path) -> None:
    """The backup is older than some answers; the cloud tells of those that it has received."""
    first = tmp_path / "first"
    assert act([first], shim, f"answer(range({age}))", before=BEFORE) == [0]
    shutil.copytree(first / "files", tmp_path / "backup")
    assert act([first], shim, "answer(range(6))", before=BEFORE) == [0]
    received = left(first)
    shutil.rmtree(first / "files")
    shutil.copytree(tmp_path / "backup", first / "files")
    orders = f"""
store = FeedbackStore(Path("agent.db"))
charges = [pb.MirroredCharge(round=round_, student="students/faq", window="2026-11-03", rho_nano=1_000)
           for round_ in {sorted(received)!r}]
for charge in charges:
    charge.end_time.FromDatetime(NOW + dt.timedelta(days=1))
store.take_over(charges, NOW)
for each in PLANS:
    if not store.has_answered(each.plan.round):
        leave(store.release_batch(each, [], lambda data: b"", NOW), int(each.plan.round.removeprefix("rounds/r")))
"""
    assert act([first], shim, orders, before=BEFORE) == [0]
    assert len(left(first)) == 8
    store = FeedbackStore(first / "files" / "agent.db")
    assert store.lifetime_spent_nano() == 8 * COST
    store.close()


def continued(disks: list[Path], shim: Path) -> None:
    """Starts the device again on disks that were disturbed, and lets it answer everything."""
    for disk in disks:
        for file in (disk / "journal", disk / "control"):
            file.unlink(missing_ok=True)
    assert set(act(disks, shim, "answer(range(8))", before=BEFORE)) == {0}


@pytest.mark.parametrize("cut", [False, True])
def test_a_device_that_starts_again_sends_the_same_bytes(tmp_path: Path, shim: Path, *, cut: bool) -> None:
    most = operations(tmp_path / "count", shim, ANSWER)
    points = random.Random(0).sample(range(1, most + 1), POINTS)
    disks = [tmp_path / str(point) for point in points]
    act(disks, shim, ANSWER, [{"kill_at": point} for point in points], BEFORE)
    for disk in disks if cut else []:
        powercut.cut(disk / "files", disk / "journal", random.Random(0))
    continued(disks, shim)
    for disk in disks:
        assert check(disk) == 8
        assert len(left(disk)) == 8
