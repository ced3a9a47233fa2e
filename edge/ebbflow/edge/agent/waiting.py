"""How long to wait: jittered, so that a fleet never comes at once. No clock and no loop in here."""

from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom

from ebbflow.common.errors import EbbflowError, Reason

SHUT_OUT: frozenset[Reason] = frozenset({Reason.CERTIFICATE_REVOKED, Reason.AGENT_QUARANTINED, Reason.AGENT_NOT_FOUND})
"""Only a person at the cloud can change these, so there is no hurry to ask again."""

uniform: Callable[[float, float], float] = SystemRandom().uniform


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Bounds of waits in seconds."""

    first_s: float = 1.0
    """Longest wait after the first failure; doubles from failure to failure."""
    most_s: float = 60.0
    """Longest wait after many."""
    shut_out_s: float = 600.0
    """Wait while the cloud refuses this identity, give or take half of it."""
    steady_s: float = 30.0
    """A connection that lasted so long makes the failures before it forgotten."""
    voted_s: float = 2.0
    """Votes leave at a multiple of this after their plan came."""
    studied_s: float = 300.0
    """Likewise where a student computes for every user: updates of adapters, and votes by a student's states."""


class Backoff:
    """Waits that grow with every failure, each drawn at random below its bound ("full jitter")."""

    def __init__(self, pace: Pace, draw: Callable[[float, float], float] = uniform) -> None:
        """Begins without failures."""
        self._pace, self._draw = pace, draw
        self._failures = 0

    def failed(self, error: EbbflowError | None) -> float:
        """Counts a failure; returns the seconds to wait before the next attempt."""
        if error and error.reason in SHUT_OUT:
            return self._draw(0.5, 1.5) * self._pace.shut_out_s
        bound_s = min(self._pace.most_s, self._pace.first_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return self._draw(0.1, 1.0) * bound_s

    def lasted(self, seconds: float) -> None:
        """Notes how long a connection held."""
        if seconds >= self._pace.steady_s:
            self._failures = 0

    def succeeded(self) -> None:
        """Forgets the failures."""
        self._failures = 0


def to_next(step_s: float, passed_s: float) -> float:
    """Returns the seconds until the next multiple of `step_s` since a moment that is `passed_s` seconds ago."""
    return step_s - passed_s % step_s


def jittered(seconds: float, draw: Callable[[float, float], float] = uniform) -> float:
    """Returns a wait within a fifth of `seconds`."""
    return draw(0.8, 1.2) * seconds
