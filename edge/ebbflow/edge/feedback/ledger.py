"""The device's own privacy account. It decides; the cloud's copy only mirrors it.

Charge, noise and the bytes that will be sent are one durable transaction. Whatever happens before its commit has cost
nothing and told nothing; whatever happens after it finds the same bytes to send.
"""

import datetime as dt
import sqlite3
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback.database import Database
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.release import make_batch

KEEP_SENT = dt.timedelta(days=7)
"""How long a batch's bytes stay after its round has ended."""


@dataclass(frozen=True)
class Account:
    """What users of one student have spent in one window, and out of what."""

    student: str
    window: str
    rho_spent_nano: int
    rho_cap_nano: int
    epsilon: float
    delta: float
    entries: int


@dataclass(frozen=True)
class Outgoing:
    """A batch that waits to be sent."""

    batch_id: str
    round: str
    signed_batch: bytes
    """A serialised SignedBatch: send it as it is."""


def _exhausted(what: str) -> EbbflowError:
    return EbbflowError(Reason.BUDGET_EXHAUSTED, f"the privacy budget of {what} does not allow another round")


def _charge_student(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    plan, policy = admitted.plan, admitted.plan.policy
    key = (admitted.student_id, plan.window)
    connection.execute(
        "INSERT INTO accounts (student, window, rho_cap_nano, rho_spent_nano, epsilon, delta) VALUES (?, ?, ?, 0, ?, ?)"
        " ON CONFLICT DO UPDATE SET epsilon = excluded.epsilon, delta = excluded.delta,"
        " rho_cap_nano = max(excluded.rho_cap_nano, rho_spent_nano)",
        (*key, policy.rho_cap_nano, policy.epsilon, policy.delta),
    )
    cost = plan.mechanism.rho_nano
    done = connection.execute(
        "UPDATE accounts SET rho_spent_nano = rho_spent_nano + ?"
        " WHERE student = ? AND window = ? AND rho_spent_nano + ? <= rho_cap_nano",
        (cost, *key, cost),
    )
    if done.rowcount != 1:
        raise _exhausted(f"{plan.student} in the window {plan.window}")


def _charge_device(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    window, cap, cost = admitted.device_window, admitted.device_cap_nano, admitted.plan.mechanism.rho_nano
    connection.execute(
        "INSERT INTO device_accounts (window, rho_cap_nano, rho_spent_nano) VALUES (?, ?, 0)"
        " ON CONFLICT DO UPDATE SET rho_cap_nano = max(excluded.rho_cap_nano, rho_spent_nano)",
        (window, cap),
    )
    done = connection.execute(
        "UPDATE device_accounts SET rho_spent_nano = rho_spent_nano + ?"
        " WHERE window = ? AND rho_spent_nano + ? <= rho_cap_nano",
        (cost, window, cost),
    )
    if done.rowcount != 1:
        raise _exhausted(f"this device in the window {window}")


class Ledger:
    """Accounts, entries and the outbox, in a database whose commits wait for the disk."""

    def __init__(self, database: Database) -> None:
        """Takes a database that was opened with synchronous=FULL."""
        self._database = database

    def release(
        self,
        admitted: AdmittedPlan,
        contributions: Collection[Contribution],
        sign: Callable[[bytes], bytes],
        now: dt.datetime,
    ) -> bytes:
        """Answers a plan once: the first call charges and makes the bytes, every later call returns them.

        Returns:
            A serialised SignedBatch.

        Raises:
            EbbflowError: BUDGET_EXHAUSTED (nothing was charged); PLAN_INVALID if the round was answered under another
                plan; DISK_FULL.
        """
        plan = admitted.plan
        with self._database.transaction() as connection:
            kept = self._answered(connection, admitted)
            if kept is not None:
                return kept
            _charge_student(connection, admitted)
            _charge_device(connection, admitted)
            batch_id, signed_batch = make_batch(admitted, contributions, sign)
            connection.execute(
                "INSERT INTO entries (batch_id, round, student, window, device_window, rho_nano, create_time)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    batch_id,
                    plan.round,
                    admitted.student_id,
                    plan.window,
                    admitted.device_window,
                    plan.mechanism.rho_nano,
                    now.timestamp(),
                ),
            )
            connection.execute(
                "INSERT INTO outbox (batch_id, round, plan_sha256, signed_batch, end_time) VALUES (?, ?, ?, ?, ?)",
                (batch_id, plan.round, admitted.plan_sha256, signed_batch, admitted.end_time.timestamp()),
            )
        return signed_batch

    @staticmethod
    def _answered(connection: sqlite3.Connection, admitted: AdmittedPlan) -> bytes | None:
        if not connection.execute("SELECT 1 FROM entries WHERE round = ?", (admitted.plan.round,)).fetchone():
            return None
        row = connection.execute(
            "SELECT signed_batch FROM outbox WHERE round = ? AND plan_sha256 = ?",
            (admitted.plan.round, admitted.plan_sha256),
        ).fetchone()
        if row is None:
            message = f"{admitted.plan.round} was answered before, under another plan"
            raise EbbflowError(Reason.PLAN_INVALID, message, why="answered")
        return bytes(row[0])

    def has_answered(self, round_name: str) -> bool:
        """Whether a round was charged, so that nothing need be computed for it again."""
        with self._database.reading() as connection:
            row = connection.execute("SELECT 1 FROM entries WHERE round = ?", (round_name,)).fetchone()
        return row is not None

    def pending(self, now: dt.datetime) -> list[Outgoing]:
        """Returns the batches that the cloud has not answered and whose round is not over, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT batch_id, round, signed_batch FROM outbox WHERE state = 'pending' AND end_time > ?"
                " ORDER BY rowid",
                (now.timestamp(),),
            ).fetchall()
        return [Outgoing(batch_id=row[0], round=row[1], signed_batch=bytes(row[2])) for row in rows]

    def settle(self, batch_id: str, refusal: str = "") -> None:
        """Notes the cloud's final answer: kept, or refused for a reason. The charge stays in either case."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE outbox SET state = ?, reason = ? WHERE batch_id = ?",
                ("refused" if refusal else "sent", refusal, batch_id),
            )

    def expire(self, now: dt.datetime) -> None:
        """Gives up what nobody takes any more, and forgets the bytes of rounds long over. Entries stay for ever."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE outbox SET state = 'expired' WHERE state = 'pending' AND end_time <= ?", (now.timestamp(),)
            )
            connection.execute("DELETE FROM outbox WHERE end_time <= ?", ((now - KEEP_SENT).timestamp(),))

    def accounts(self) -> list[Account]:
        """Returns every account, newest window first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT student, window, rho_spent_nano, rho_cap_nano, epsilon, delta, (SELECT COUNT(*) FROM entries"
                " WHERE entries.student = accounts.student AND entries.window = accounts.window)"
                " FROM accounts ORDER BY window DESC, student"
            ).fetchall()
        return [Account(*row) for row in rows]

    def device_spent_nano(self, window: str) -> int:
        """What all students together have cost in one of the device's own windows."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT rho_spent_nano FROM device_accounts WHERE window = ?", (window,)
            ).fetchone()
        return int(row[0]) if row else 0
