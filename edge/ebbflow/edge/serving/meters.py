"""What the serving of a student tells whoever counts it."""

from collections.abc import Callable
from typing import Protocol


class Meters(Protocol):
    """Hears of one student's requests.

    Called on the engine's thread and on those that ask, so an implementation must be quick, safe between threads, and
    never raise. Reasons are words of a closed list: those of `Finish`, "cancelled", and names of the error catalogue in
    lower case.
    """

    def arrived(self) -> None:
        """A request came, whatever becomes of it."""

    def first_token(self, seconds: float) -> None:
        """The first token of an answer came so long after the request."""

    def tokens(self, count: int) -> None:
        """A step gave so many tokens of answers."""

    def finished(self, reason: str) -> None:
        """A request ended that was taken on: "stop", "length", "scored", "cancelled", "out_of_memory" and others."""

    def refused(self, reason: str) -> None:
        """A request was not taken on, such as for "queue_full"."""


class NoMeters:
    """Counts nothing; see `Meters`."""

    def arrived(self) -> None:
        """Ignores it."""

    def first_token(self, seconds: float) -> None:
        """Ignores it."""

    def tokens(self, count: int) -> None:
        """Ignores it."""

    def finished(self, reason: str) -> None:
        """Ignores it."""

    def refused(self, reason: str) -> None:
        """Ignores it."""


MakeMeters = Callable[[str], Meters]
"""Gives the meters of a student such as "students/faq"."""


def no_meters(student: str) -> Meters:
    """Counts nothing of any student."""
    del student
    return NoMeters()
