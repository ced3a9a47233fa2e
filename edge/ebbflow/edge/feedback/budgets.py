"""The limits that a charge must keep, as sums over the entries of the account. Everything in one transaction."""

import datetime as dt
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
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

    def spent_nano(self, connection: sqlite3.Connection) -> int:
        """What they have cost, in billionths of rho."""
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
        query = f"SELECT COALESCE(SUM(rho_nano), 0) FROM entries WHERE {' AND '.join(conditions)}"  # noqa: S608
        return int(connection.execute(query, values).fetchone()[0])


def window_span(window: str, window_days: int, student: str | None = None) -> Span:
    """Returns the span of a window.

    It goes by time and not by the window's name, so that a policy whose windows get another length renews nothing.
    """
    return Span(student, window_start(window), window_end(window, window_days))


def _limits(admitted: AdmittedPlan) -> Iterator[tuple[Span, int, Reason, str]]:
    """What holds for a plan: the span, its cap, and the words for what is exhausted."""
    plan, policy, student = admitted.plan, admitted.plan.policy, admitted.student_id
    window, device = plan.window, admitted.device_window
    yield (
        window_span(window, policy.window_days, student),
        policy.rho_cap_nano,
        Reason.BUDGET_EXHAUSTED,
        f"{plan.student} in the window {window}",
    )
    yield (
        window_span(device, admitted.device_window_days),
        admitted.device_cap_nano,
        Reason.BUDGET_EXHAUSTED,
        f"this device in the window {device}",
    )
    if policy.lifetime_rho_cap_nano:
        cap = policy.lifetime_rho_cap_nano
        yield Span(student), cap, Reason.LIFETIME_EXHAUSTED, f"{plan.student} over all windows"
    if admitted.device_lifetime_nano:
        yield Span(), admitted.device_lifetime_nano, Reason.LIFETIME_EXHAUSTED, "this device over all windows"


def check_limits(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    """Refuses a charge that would go beyond a cap.

    Raises:
        EbbflowError: BUDGET_EXHAUSTED or LIFETIME_EXHAUSTED.
    """
    for span, cap_nano, reason, what in _limits(admitted):
        if span.spent_nano(connection) + admitted.plan.mechanism.rho_nano > cap_nano:
            raise EbbflowError(reason, f"the privacy budget of {what} does not allow another round")


def check_clock(connection: sqlite3.Connection, admitted: AdmittedPlan) -> None:
    """Refuses a plan of a window that had ended when this account was last charged.

    Raises:
        EbbflowError: ROUND_CLOSED.
    """
    last_s = connection.execute("SELECT MAX(charge_time) FROM entries WHERE batch_id IS NOT NULL").fetchone()[0]
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
