"""How many threads fit the cores that are free. No IO and no clock.

All threads of a step wait for the slowest, so one that has to share its core holds up the others: with one busy
neighbour on two cores, one thread is two to three times as fast as two.
"""

import math

FEWER_S = 1.0
"""Seconds of contention before threads go."""
MORE_S = 10.0
"""Seconds of free cores before threads come back; doubles each time that they did not last."""
LASTED_S = 60.0
_MOST_DOUBLINGS = 4
_TO_STAY = 0.5
_TO_COME = 0.25
"""Parts of a core that the last thread may lack: less to come than to stay, so that a count does not swing."""


class ThreadFit:
    """Fewer threads soon, more threads later."""

    def __init__(self, most: int) -> None:
        """Takes the most threads that the engine can compute with."""
        self._most = most
        self._tight_since_s: float | None = float("-inf")  # what a new engine finds counts at once
        self._free_since_s: float | None = None
        self._raised_s = float("-inf")
        self._doublings = 0

    def fit(self, free_cores: float, threads: int, now_s: float) -> int:
        """Returns how many threads to compute with.

        Args:
            free_cores: that other programs leave to this one, its own use included.
            threads: that compute now.
            now_s: on a clock that never goes back.
        """
        fewer, more = self._rounded(free_cores + _TO_STAY), self._rounded(free_cores + _TO_COME)
        self._tight_since_s = _since(self._tight_since_s, fewer < threads, now_s)
        self._free_since_s = _since(self._free_since_s, more > threads, now_s)
        if self._tight_since_s is not None and now_s - self._tight_since_s >= FEWER_S:
            lasted = now_s - self._raised_s >= LASTED_S
            self._doublings = 0 if lasted else min(self._doublings + 1, _MOST_DOUBLINGS)
            self._tight_since_s = None
            return fewer
        if self._free_since_s is not None and now_s - self._free_since_s >= MORE_S * 2**self._doublings:
            self._free_since_s, self._raised_s = None, now_s
            return more
        return threads

    def _rounded(self, cores: float) -> int:
        return max(1, min(self._most, math.floor(cores)))


def _since(since_s: float | None, holds: bool, now_s: float) -> float | None:
    if not holds:
        return None
    return now_s if since_s is None else since_s
