"""How busy a student is: what the governor and whoever watches the device decide by."""

import threading
from collections import deque
from dataclasses import dataclass

FIRST_TOKEN_WINDOW_S = 60.0
TOKENS_WINDOW_S = 5.0
_MOST_FIRST_TOKENS = 512
_STEP_WEIGHT = 0.1
_TAIL = 0.95


@dataclass(frozen=True)
class Load:
    """One moment of a student's serving."""

    running: int
    """Sequences in the batch."""
    queued: int
    """Sequences that wait for a place in it."""
    queued_tokens: int
    """Tokens of prompts that the engine has yet to see, running ones included."""
    step_s: float
    """Seconds of a step, as an exponentially weighted average over some ten steps; 0 before the first."""
    first_token_s: float | None
    """95th percentile of the times to the first token in the last 60 seconds; None if there were none."""
    tokens_per_s: float
    """Tokens of answers in the last 5 seconds, for each second."""


class LoadMeter:
    """Averages what the engine's thread reports. Takes the time as an argument; safe between threads."""

    def __init__(self) -> None:
        """Starts without experience."""
        self._lock = threading.Lock()
        self._step_s = 0.0
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_MOST_FIRST_TOKENS)
        self._tokens: deque[tuple[float, int]] = deque()

    def step(self, seconds: float, tokens: int, now_s: float) -> None:
        """A step took so long and gave so many tokens of answers."""
        with self._lock:
            weight = _STEP_WEIGHT if self._step_s else 1.0
            self._step_s += weight * (seconds - self._step_s)
            if tokens:
                self._tokens.append((now_s, tokens))
            self._forget(now_s)

    def first_token(self, seconds: float, now_s: float) -> None:
        """The first token of an answer came so long after its request."""
        with self._lock:
            self._first_tokens.append((now_s, seconds))

    def read(self, running: int, queued: int, queued_tokens: int, now_s: float) -> Load:
        """Returns the load at this moment, given what is known elsewhere."""
        with self._lock:
            self._forget(now_s)
            step_s, firsts_s = self._step_s, sorted(seconds for _, seconds in self._first_tokens)
            tokens_per_s = sum(count for _, count in self._tokens) / TOKENS_WINDOW_S
        first_token_s = firsts_s[min(len(firsts_s) - 1, int(_TAIL * len(firsts_s)))] if firsts_s else None
        return Load(running, queued, queued_tokens, step_s, first_token_s, tokens_per_s)

    def _forget(self, now_s: float) -> None:
        while self._first_tokens and self._first_tokens[0][0] <= now_s - FIRST_TOKEN_WINDOW_S:
            self._first_tokens.popleft()
        while self._tokens and self._tokens[0][0] <= now_s - TOKENS_WINDOW_S:
            self._tokens.popleft()
