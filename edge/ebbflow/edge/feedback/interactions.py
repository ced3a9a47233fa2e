"""What users asked, what they got and what they made of it. It stays on the device, for a limited time."""

import datetime as dt
import sqlite3
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.consent import Consents
from ebbflow.edge.feedback.database import Database
from ebbflow.edge.feedback.users import UserHasher

log = structlog.get_logger(__name__)

_SCRUB_S = 0.5
MAX_TEXT_CHARACTERS = 8192
"""Longer prompts and answers are cut."""


@dataclass(frozen=True)
class Retention:
    """How long interactions stay, and how many of one user.

    There is deliberately no limit over all users together: one user's flood would then push out what others vote with,
    and one user more would change more than one vote.
    """

    days: int = 30
    rows_per_user: int = 1000


@dataclass(frozen=True)
class Interaction:
    """One request of one user, without its text."""

    id: str
    user: bytes
    outcome: "rpb.Outcome.ValueType" = rpb.OUTCOME_UNSPECIFIED


class Row(NamedTuple):
    """One request and its answer as they are kept."""

    id: str
    student: str
    release: str
    user: bytes
    prompt: str
    answer: str
    create_time_s: float


def new_interaction_id() -> str:
    """Makes the name of an interaction before its answer is complete."""
    return uuid.uuid4().hex


class Interactions:
    """Table of interactions. Times are aware."""

    def __init__(self, database: Database, hasher: UserHasher, retention: Retention, consents: Consents) -> None:
        """Keeps interactions of users who take part, in a database that need not wait for the disk at every one."""
        self._database = database
        self._hasher = hasher
        self._retention = retention
        self._consents = consents

    def row(
        self, id_: str, student: str, release: str, user_key: str | None, prompt: str, answer: str, now: dt.datetime
    ) -> Row:
        """Returns what `record` keeps, with the user hashed and the texts cut: it may have to wait in memory."""
        return Row(id_, student, release, self._hasher.hash(user_key), _cut(prompt), _cut(answer), now.timestamp())

    def record(self, row: Row) -> None:
        """Keeps an interaction unless its user does not take part; the same id again changes nothing."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO interactions (id, student, release, user, prompt, answer, create_time)"
                " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7"
                " WHERE (?4 IN (SELECT user FROM users WHERE allowed = ?8)) = ?8",
                (*row, self._consents.asked),
            )
            connection.execute(
                "DELETE FROM interactions WHERE id IN (SELECT id FROM interactions WHERE user = ?"
                " ORDER BY create_time DESC LIMIT -1 OFFSET ?)",
                (row.user, self._retention.rows_per_user),
            )

    def judge(self, id_: str, outcome: "rpb.Outcome.ValueType") -> None:
        """Keeps an outcome; the last one counts.

        Raises:
            EbbflowError: INTERACTION_NOT_FOUND; INVALID_REQUEST if the outcome is not one of the four.
        """
        if outcome not in rpb.Outcome.values() or outcome == rpb.OUTCOME_UNSPECIFIED:
            raise EbbflowError(Reason.INVALID_REQUEST, "the outcome is not one of those known", field="outcome")
        with self._database.transaction() as connection:
            done = connection.execute(
                "UPDATE interactions SET outcome = ?1 WHERE id = ?2"
                " AND (user IN (SELECT user FROM users WHERE allowed = ?3)) = ?3",
                (int(outcome), id_, self._consents.asked),
            )
            if not done.rowcount:
                raise EbbflowError(Reason.INTERACTION_NOT_FOUND, "no such interaction is kept on this device")

    def purge(self, user_key: str | None) -> int:
        """Removes everything of one user; returns how many interactions that were. `scrub` is to follow."""
        with self._database.transaction() as connection:
            done = connection.execute("DELETE FROM interactions WHERE user = ?", (self._hasher.hash(user_key),))
        return done.rowcount

    def scrub(self, within_s: float) -> None:
        """Empties the write-ahead log of what was removed.

        Raises:
            EbbflowError: DEADLINE_EXCEEDED if another connection reads all the time.
        """
        self._database.scrub(within_s)

    def forget_old(self, now: dt.datetime) -> int:
        """Removes what is older than the retention; returns how many interactions that were.

        What seems to come from the future was recorded by a clock that ran ahead, or this clock is behind and will be
        set right. So it stays as it is, unless it lies further ahead than the retention: then it is as old as if it
        came now. Nothing stays for longer than twice the retention, and a clock that is behind by less makes nothing
        older than it is.

        It also takes out of the write-ahead log what has been removed since the last time, for whatever reason; while
        another process reads, that waits for the next time.
        """
        kept = dt.timedelta(days=self._retention.days)
        latest_s, oldest_s = (now + kept).timestamp(), (now - kept).timestamp()
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE interactions SET create_time = ? WHERE create_time > ?", (now.timestamp(), latest_s)
            )
            done = connection.execute("DELETE FROM interactions WHERE create_time < ?", (oldest_s,))
        try:
            self._database.scrub(_SCRUB_S)
        except EbbflowError as error:
            if error.reason is not Reason.DEADLINE_EXCEEDED:
                raise
            log.info("log_not_emptied_yet", why=str(error))
        return done.rowcount

    def within(self, student: str, start: dt.datetime, end: dt.datetime) -> list[Interaction]:
        """Returns a student's interactions from `start` on and before `end`, of users who take part and may vote."""
        with self._database.reading() as connection:
            return self.read_within(connection, student, start, end)

    def read_within(
        self, connection: sqlite3.Connection, student: str, start: dt.datetime, end: dt.datetime
    ) -> list[Interaction]:
        """Does as `within` does, as a connection sees it that may be in a transaction."""
        rows = connection.execute(
            "SELECT id, user, outcome FROM interactions"
            " WHERE student = ?1 AND create_time >= ?2 AND create_time < ?3"
            " AND (user IN (SELECT user FROM users WHERE allowed = ?4)) = ?4"
            " AND user NOT IN (SELECT user FROM users WHERE paused = 1)",
            (student, start.timestamp(), end.timestamp(), self._consents.asked),
        ).fetchall()
        return [Interaction(id=row[0], user=row[1], outcome=row[2]) for row in rows]

    def texts(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Returns prompt and answer of some interactions, by id; those that are gone meanwhile are left out."""
        with self._database.reading() as connection:
            query = "SELECT prompt, answer FROM interactions WHERE id = ?"
            found = [connection.execute(query, (id_,)).fetchone() for id_ in ids]
        return {id_: (row[0], row[1]) for id_, row in zip(ids, found, strict=True) if row}

    def prompts(self, ids: Sequence[str]) -> dict[str, str]:
        """Returns the prompts of some interactions, by id."""
        return {id_: prompt for id_, (prompt, _) in self.texts(ids).items()}

    def count(self) -> tuple[int, int]:
        """Returns how many interactions of how many users are kept. For the device's own eyes only."""
        with self._database.reading() as connection:
            row = connection.execute("SELECT COUNT(*), COUNT(DISTINCT user) FROM interactions").fetchone()
        return int(row[0]), int(row[1])


def _cut(text: str) -> str:
    return text[:MAX_TEXT_CHARACTERS].encode("utf-8", "replace").decode()
