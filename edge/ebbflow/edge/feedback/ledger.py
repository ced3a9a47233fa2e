"""The device's own privacy account. It decides; the cloud's copy only mirrors it.

Charge, noise and the bytes that will be sent are one durable transaction. Whatever happens before its commit has cost
nothing and told nothing; whatever happens after it finds the same bytes to send.
"""

import datetime as dt
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import DEFAULT_DELTA
from ebbflow.edge.feedback import budgets, history
from ebbflow.edge.feedback.database import Database
from ebbflow.edge.feedback.identity import Identity
from ebbflow.edge.feedback.plans import AdmittedPlan

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


MakeBatch = Callable[[sqlite3.Connection], tuple[str, bytes]]
"""Adds fresh noise; returns the batch's id and the bytes of a SignedBatch. It is given the open transaction."""


def _check(connection: sqlite3.Connection, admitted: AdmittedPlan, identity: Identity, now: dt.datetime) -> None:
    if now < admitted.answer_from:
        message = f"{admitted.plan.round} is answered from {admitted.answer_from.isoformat()} on"
        raise EbbflowError(Reason.PLAN_INVALID, message, why="early")
    if now >= admitted.end_time:
        raise EbbflowError(Reason.ROUND_CLOSED, f"{admitted.plan.round} is over", round=admitted.plan.round)
    identity.check(admitted, now)
    history.check(connection, admitted)
    budgets.check_clock(connection, admitted)
    budgets.check_limits(connection, admitted)


def _keep_terms(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    policy = admitted.plan.policy
    connection.execute(
        "INSERT INTO accounts (student, window, rho_cap_nano, epsilon, delta) VALUES (?, ?, ?, ?, ?) ON CONFLICT"
        " DO UPDATE SET epsilon = excluded.epsilon, delta = excluded.delta, rho_cap_nano = excluded.rho_cap_nano",
        (admitted.student_id, admitted.plan.window, policy.rho_cap_nano, policy.epsilon, policy.delta),
    )


def _keep_charge(connection: sqlite3.Connection, admitted: AdmittedPlan, batch_id: str, now: dt.datetime) -> None:
    plan = admitted.plan
    row = (plan.round, batch_id, admitted.student_id, plan.window, plan.mechanism.rho_nano)
    connection.execute(
        "INSERT INTO entries (round, batch_id, student, window, rho_nano, charge_time, end_time)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*row, now.timestamp(), admitted.end_time.timestamp()),
    )


def _keep_batch(connection: sqlite3.Connection, admitted: AdmittedPlan, batch_id: str, signed_batch: bytes) -> None:
    connection.execute(
        "INSERT INTO outbox (batch_id, round, plan_sha256, signed_batch, end_time) VALUES (?, ?, ?, ?, ?)",
        (batch_id, admitted.plan.round, admitted.plan_sha256, signed_batch, admitted.end_time.timestamp()),
    )


class Ledger:
    """Accounts, entries and the outbox, in a database whose commits wait for the disk."""

    def __init__(self, database: Database, identity: Identity) -> None:
        """Takes a database that was opened with synchronous=FULL, and who the device is."""
        self._database, self._identity = database, identity

    def release(self, admitted: AdmittedPlan, make_batch: MakeBatch, now: dt.datetime) -> bytes:
        """Answers a plan once: the first call charges and makes the bytes, every later call returns them.

        Args:
            admitted: the plan.
            make_batch: called at most once, after everything that could refuse the charge.
            now: the device's time.

        Returns:
            A serialised SignedBatch.

        Raises:
            EbbflowError: BUDGET_EXHAUSTED, LIFETIME_EXHAUSTED, ROUND_CLOSED (it is over, or its window ended before the
                last charge), IDENTITY_WAITS, PLAN_INVALID (the round was answered under another plan or by a copy of
                this device, it is too early to answer it, or the policy is older than one that was seen), DISK_FULL.
                Nothing was charged.
        """
        with self._database.transaction() as connection:
            kept = self._answered(connection, admitted)
            if kept is not None:
                return kept
            _check(connection, admitted, self._identity, now)
            history.note_answered(connection, admitted, now)
            _keep_terms(connection, admitted)
            batch_id, signed_batch = make_batch(connection)
            _keep_charge(connection, admitted, batch_id, now)
            _keep_batch(connection, admitted, batch_id, signed_batch)
        return signed_batch

    def take_over(self, charges: Iterable[pb.MirroredCharge], now: dt.datetime) -> int:
        """Charges the account with what the cloud knows of and the account does not; returns how many rounds that were.

        Such a round is never answered, and a batch that still waits for it is not sent: one has left under this
        identity already, and a disk that was restored may hold another with other noise. If there was anything to take
        over, the disk is one of the past: then nothing that waits is sent, because what was answered since and what
        waits were never held against one cap together.

        Raises:
            EbbflowError: PLAN_INVALID if a charge makes no sense; then nothing is taken over.
        """
        known = [budgets.read(charge) for charge in charges]
        with self._database.reading() as connection:
            news = budgets.lacking(connection, known)
            waiting = {row[0] for row in connection.execute("SELECT round FROM outbox WHERE state = 'pending'")}
        settled = waiting & {charge.round for charge in known}
        if news or settled:
            with self._database.transaction() as connection:
                budgets.take_over(connection, news, now)
                connection.executemany(
                    "UPDATE outbox SET state = 'sent' WHERE round = ? AND state = 'pending'",
                    [(round_,) for round_ in sorted(settled)],
                )
                if news:
                    connection.execute("UPDATE outbox SET state = 'expired' WHERE state = 'pending'")
        return len(news)

    def check(self, admitted: AdmittedPlan, now: dt.datetime) -> None:
        """Refuses what `release` would refuse, before anything is computed for it.

        Raises:
            EbbflowError: as `release`.
        """
        with self._database.reading() as connection:
            _check(connection, admitted, self._identity, now)

    def decline(self, signed: pb.SignedPlan, admitted: AdmittedPlan | None, reason: Reason, now: dt.datetime) -> None:
        """Keeps a plan that is not answered, and its policy's version if the plan was sound otherwise."""
        with self._database.transaction() as connection:
            history.note_declined(connection, signed, reason.name, now)
            if admitted:
                history.note_policy(connection, admitted)

    @staticmethod
    def _answered(connection: sqlite3.Connection, admitted: AdmittedPlan) -> bytes | None:
        if not connection.execute("SELECT 1 FROM entries WHERE round = ?", (admitted.plan.round,)).fetchone():
            return None
        row = connection.execute(
            "SELECT signed_batch FROM outbox WHERE round = ? AND plan_sha256 = ?",
            (admitted.plan.round, admitted.plan_sha256),
        ).fetchone()
        if row is None:
            message = f"{admitted.plan.round} was answered before, under another plan or by a copy of this device"
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
            history.forget_old(connection, now)

    def last_charge_time(self) -> dt.datetime | None:
        """When this account was last charged for an answer; None if it never was."""
        with self._database.reading() as connection:
            last_s = budgets.last_charge_s(connection)
        return None if last_s is None else dt.datetime.fromtimestamp(last_s, dt.UTC)

    def accounts(self) -> list[Account]:
        """Returns every account, newest window first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT student, window, SUM(rho_nano), COUNT(*), MAX(rho_cap_nano), MAX(epsilon), MAX(delta)"
                " FROM entries LEFT JOIN accounts USING (student, window)"
                " GROUP BY student, window ORDER BY window DESC, student"
            ).fetchall()
            policies = history.policies(connection)
        return [_account(row, policies.get(row[0], (0, pb.PrivacyPolicy()))[1]) for row in rows]

    def spent_nano(self, span: budgets.Span) -> int:
        """What rounds of a span have cost, in billionths of rho."""
        with self._database.reading() as connection:
            return span.spent_nano(connection)

    def decisions(self, limit: int) -> list[history.Decision]:
        """Returns the last plans and what became of them, newest first."""
        with self._database.reading() as connection:
            return history.decisions(connection, limit)

    def policies(self) -> dict[str, tuple[int, pb.PrivacyPolicy]]:
        """Returns the version and the words of each student's newest policy, by the student's id."""
        with self._database.reading() as connection:
            return history.policies(connection)


def _account(
    row: tuple[str, str, int, int, int | None, float | None, float | None], policy: pb.PrivacyPolicy
) -> Account:
    """An account; where only the cloud told of its charges, in the words of the newest policy."""
    student, window, spent, entries, cap, epsilon, delta = row
    return Account(
        student=student,
        window=window,
        rho_spent_nano=spent,
        rho_cap_nano=max(spent, cap or policy.rho_cap_nano),
        epsilon=epsilon or policy.epsilon,
        delta=delta or policy.delta or DEFAULT_DELTA,
        entries=entries,
    )
