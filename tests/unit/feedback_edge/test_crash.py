"""A process that is killed at any moment neither spends twice nor loses a charge."""

import contextlib
import datetime as dt
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.edge.feedback.store import FeedbackStore

ROUNDS = 400

# Forks once for each line on stdin, so that only the first start pays for the imports. The fork answers every round and
# says on stdout what it would now send.
WORKER = """
import datetime as dt, hashlib, os, sys
from pathlib import Path
from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.store import FeedbackStore

now = dt.datetime.fromisoformat(sys.argv[3])
admitted = []
for line in Path(sys.argv[2]).read_text().split():
    plan = pb.RoundPlan.FromString(bytes.fromhex(line))
    admitted.append(AdmittedPlan(plan, hashlib.sha256(bytes.fromhex(line)).digest(), plan.window, 10**12, 1))

def work():
    store = FeedbackStore(Path(sys.argv[1]))
    for each in admitted:
        sent = store.release_batch(each, [Contribution(0)], lambda data: hashlib.sha256(data).digest(), now)
        os.write(1, f"sent {each.plan.round} {hashlib.sha256(sent).hexdigest()}\\n".encode())

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    os.write(1, f"pid {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"over\\n")
"""


class Device:
    """A process that works on one store and can be killed and started again."""

    def __init__(self, path: Path, plans: Path, now: dt.datetime) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), str(plans), now.isoformat()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def run(self, lifetime_s: float | None) -> dict[str, str]:
        """Starts the work and kills it after a while, or lets it finish; returns hashes of what it sent, by round."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        sent: dict[str, str] = {}
        for line in self.process.stdout:
            match line.decode().split():
                case ["pid", pid] if lifetime_s is not None:
                    time.sleep(lifetime_s)
                    with contextlib.suppress(ProcessLookupError):  # it may have finished
                        os.kill(int(pid), signal.SIGKILL)
                case ["sent", round_, digest]:
                    sent[round_] = digest
                case ["over"]:
                    break
        return sent

    def close(self) -> None:
        self.process.communicate(timeout=30)


def check_books(path: Path, cost: int) -> None:
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        entries = connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0]
        batches = connection.execute("SELECT COUNT(*) FROM outbox JOIN entries USING (batch_id, round)").fetchone()[0]
        spent = connection.execute("SELECT COALESCE(SUM(rho_nano), 0) FROM entries").fetchone()[0]
        plans = connection.execute("SELECT COUNT(*) FROM plans JOIN outbox ON sha256 = plan_sha256").fetchone()[0]
    finally:
        connection.close()
    assert batches == entries == plans
    assert spent == entries * cost


def write_plans(path: Path, plan: pb.RoundPlan) -> None:
    lines = []
    for i in range(ROUNDS):
        plan.round = f"rounds/r{i}"
        lines.append(plan.SerializeToString().hex())
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("kills", [30, pytest.param(400, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_the_books_whole(
    tmp_path: Path, make: Callable[..., pb.RoundPlan], now: dt.datetime, kills: int
) -> None:
    path, plans_path = tmp_path / "agent.db", tmp_path / "plans"
    plan = make()
    plan.policy.rho_cap_nano = 10**12  # the limits are tested elsewhere; here every round is to be charged
    plan.policy.epsilon = 1e4
    write_plans(plans_path, plan)
    FeedbackStore(path).close()
    device, known = Device(path, plans_path, now), dict[str, str]()
    try:
        for _ in range(kills):
            sent = device.run(lifetime_s=random.uniform(0.0, 0.06))
            assert all(known.get(round_, digest) == digest for round_, digest in sent.items())
            known |= sent
            check_books(path, plan.mechanism.rho_nano)
        last = device.run(lifetime_s=None)
    finally:
        device.close()
    assert known.items() <= last.items()
    assert len(last) == ROUNDS
    check_books(path, plan.mechanism.rho_nano)
    store = FeedbackStore(path)
    stored = {waiting.round: hashlib.sha256(waiting.signed_batch).hexdigest() for waiting in store.pending(now)}
    store.close()
    assert stored == last
