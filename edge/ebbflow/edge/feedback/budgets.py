"""The limits that a charge must keep, over the entries of the account. Everything in one transaction."""

import datetime as dt
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.accounting import epsilon_of
from ebbflow.common.privacy.composition import within
from ebbflow.common.privacy.windows import window_end, window_start
from ebbflow.edge.feedback.plans import AdmittedPlan

MAX_CHARGE_NANO = 2**40
"""Beyond every cap. What the cloud says is cut there, so that sums stay within 64 bits."""


@dataclass(frozen=True)
class Span:
    """Rounds of some students that end in some time."""

    student: str | None = None
    """Id; None means all together."""
    start: dt.datetime | None = None
    end: dt.datetime | None = None

    def costs_nano(self, connection: sqlite3.Connection) -> Counter[int]:
        """What they have cost, in billionths of rho: how many there are of each cost."""
        conditions = ["1"]
        values: list[object] = []
        for condition, value in (
            ("student = ?", self.student),
            ("end_time >= ?", self.start and self.start.timestamp()),
            ("end_time < ?", self.end and self.end.timestamp()),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        query = f"SELECT rho_nano, COUNT(*) FROM entries WHERE {' AND '.join(conditions)} GROUP BY rho_nano"  # noqa: S608
        return Counter(dict(connection.execute(query, values)))

    def spent_nano(self, connection: sqlite3.Connection) -> int:
        """What they have cost together."""
        return sum(cost * rounds for cost, rounds in self.costs_nano(connection).items())


def window_span(window: str, window_days: int, student: str | None = None) -> Span:
    """Returns the span of a window.

    It goes by time and not by the window's name, so that a policy whose windows get another length renews nothing.
    """
    return Span(student, window_start(window), window_end(window, window_days))


@dataclass(frozen=True)
class _Limit:
    """What the rounds of a span may cost."""

    span: Span
    cap_nano: int
    epsilon: float
    delta: float
    reason: Reason
    what: str

    def allows(self, connection: sqlite3.Connection, cost_nano: int) -> bool:
        """Whether another round may be charged: by the sum of rho, and by what is proved of the epsilon."""
        costs = self.span.costs_nano(connection)
        costs[cost_nano] += 1
        spent = sum(cost * rounds for cost, rounds in costs.items())
        return spent <= self.cap_nano and within(costs, self.epsilon, self.delta)


def _limits(admitted: AdmittedPlan) -> Iterator[_Limit]:
    plan, policy, student = admitted.plan, admitted.plan.policy, admitted.student_id
    window, device = plan.window, admitted.device_window
    span = window_span(window, policy.window_days, student)
    what = f"{plan.student} in the window {window}"
    yield _Limit(span, policy.rho_cap_nano, policy.epsilon, policy.delta, Reason.BUDGET_EXHAUSTED, what)

    def limit(span: Span, cap_nano: int, delta: float, reason: Reason, what: str) -> _Limit:
        return _Limit(span, cap_nano, epsilon_of(cap_nano + 1, delta), delta, reason, what)  # caps are rounded down

    span, delta = window_span(device, admitted.device_window_days), admitted.device_delta
    yield limit(span, admitted.device_cap_nano, delta, Reason.BUDGET_EXHAUSTED, f"this device in the window {device}")
    if cap := policy.lifetime_rho_cap_nano:
        yield limit(Span(student), cap, policy.delta, Reason.LIFETIME_EXHAUSTED, f"{plan.student} over all windows")
    if cap := admitted.device_lifetime_nano:
        yield limit(Span(), cap, delta, Reason.LIFETIME_EXHAUSTED, "this device over all windows")


def check_limits(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    """Refuses a charge that would go beyond a cap.

    Raises:
        EbbflowError: BUDGET_EXHAUSTED or LIFETIME_EXHAUSTED.
    """
    for limit in _limits(admitted):
        if not limit.allows(connection, admitted.plan.mechanism.rho_nano):
            raise EbbflowError(limit.reason, f"the privacy budget of {limit.what} does not allow another round")


def last_charge_s(connection: sqlite3.Connection) -> float | None:
    """When this account was last charged for an answer; None if it never was."""
    row = connection.execute("SELECT MAX(charge_time) FROM entries WHERE batch_id IS NOT NULL").fetchone()
    return None if row[0] is None else float(row[0])


def check_clock(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    """Refuses a plan of a window that had ended when this account was last charged.

    Raises:
        EbbflowError: ROUND_CLOSED.
    """
    last_s = last_charge_s(connection)
    if last_s is None:
        return
    end = min(
        window_end(admitted.plan.window, admitted.plan.policy.window_days),
        window_end(admitted.device_window, admitted.device_window_days),
    )
    if end.timestamp() <= last_s:
        message = f"{admitted.plan.round} lies in a window that had ended when this device was last charged"
        raise EbbflowError(Reason.ROUND_CLOSED, message, round=admitted.plan.round)


@dataclass(frozen=True)
class Mirrored:
    """A charge that the cloud knows of."""

    round: str
    student: str
    """Id."""
    window: str
    rho_nano: int
    end_time_s: float


def read(charge: pb.MirroredCharge) -> Mirrored:
    """Reads what the cloud says.

    Raises:
        EbbflowError: PLAN_INVALID if it makes no sense.
    """
    try:
        names.parse(charge.round, "rounds")
        student = names.parse(charge.student, "students")
        window_start(charge.window)
        if not (charge.rho_nano and charge.HasField("end_time")):
            raise ValueError
        end_time_s = charge.end_time.ToDatetime(dt.UTC).timestamp()
    except (EbbflowError, ValueError, OverflowError):
        message = "the cloud's copy of this device's privacy account cannot be read; no round is answered"
        raise EbbflowError(Reason.PLAN_INVALID, message, why="charges") from None
    return Mirrored(charge.round, student, charge.window, min(charge.rho_nano, MAX_CHARGE_NANO), end_time_s)


def lacking(connection: sqlite3.Connection, charges: Iterable[Mirrored]) -> list[Mirrored]:
    """Returns what the cloud knows of and this account does not, or at a lower cost."""
    known = dict(connection.execute("SELECT round, rho_nano FROM entries"))
    return [charge for charge in charges if known.get(charge.round, 0) < charge.rho_nano]


def take_over(connection: sqlite3.Connection, charges: Iterable[Mirrored], now: dt.datetime) -> None:
    """Charges the account with what the cloud knows of; by round, so that it is never less than either."""
    connection.executemany(
        "INSERT INTO entries (round, batch_id, student, window, rho_nano, charge_time, end_time)"
        " VALUES (?, NULL, ?, ?, ?, ?, ?)"
        " ON CONFLICT (round) DO UPDATE SET rho_nano = max(rho_nano, excluded.rho_nano)",
        [
            (charge.round, charge.student, charge.window, charge.rho_nano, now.timestamp(), charge.end_time_s)
            for charge in charges
        ],
    )
