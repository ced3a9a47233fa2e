"""Which users take part in private feedback: their own word, and the operator's pause."""

import enum
from dataclasses import dataclass

from ebbflow.edge.feedback.database import Database
from ebbflow.edge.feedback.users import UserHasher


class Consent(enum.StrEnum):
    """What holds for users who have not said anything."""

    ASSUMED = "assumed"
    """They take part until they say no."""
    REQUIRED = "required"
    """They do not take part until they say yes."""


@dataclass(frozen=True)
class Words:
    """How many users have said what. For the device's own eyes only."""

    allowed: int
    refused: int
    paused: int


class Consents:
    """Table of users who have said something, by their keyed hash. It outlives a purge: the word is kept."""

    def __init__(self, database: Database, hasher: UserHasher, rule: Consent) -> None:
        """Takes a database whose commits wait for the disk: a refusal must survive a power cut."""
        self._database, self._hasher, self.rule = database, hasher, rule

    @property
    def asked(self) -> int:
        """The word that decides: users take part if having said it (`allowed` of 0 or 1) is as true as the word.

        In SQL: `(user IN (SELECT user FROM users WHERE allowed = :asked)) = :asked`. A user's word is no other user's
        matter, so that no vote depends on who else takes part.
        """
        return int(self.rule is Consent.REQUIRED)

    def allow(self, user_key: str | None, *, allowed: bool) -> None:
        """Keeps a user's word; it holds from the next request and the next report on."""
        self._write("allowed", user_key, value=allowed)

    def pause(self, user_key: str | None, *, paused: bool) -> None:
        """Stops a user's votes without forgetting anything, or lets them vote again."""
        self._write("paused", user_key, value=paused)

    def _write(self, column: str, user_key: str | None, *, value: bool) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                f"INSERT INTO users (user, {column}) VALUES (?, ?)"  # noqa: S608 - one of two names
                f" ON CONFLICT DO UPDATE SET {column} = excluded.{column}",
                (self._hasher.hash(user_key), int(value)),
            )

    def count(self) -> Words:
        """Counts the words."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT COALESCE(SUM(allowed = 1), 0), COALESCE(SUM(allowed = 0), 0), COALESCE(SUM(paused), 0)"
                " FROM users"
            ).fetchone()
        return Words(*map(int, row))
