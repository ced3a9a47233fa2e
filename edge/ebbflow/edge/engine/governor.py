"""Decides in which precision and with how many threads a student computes. No IO and no clock.

    decision = governor.decide(reading, now_s)     # again and again
    # bring it about; the next reading tells what came of it

First the threads are fitted to the cores that are free (`thread_fit`), because that alone changes no answer. The
precision follows what there is evidence for (`strain`): a step down when it has lasted, to the lowest at once where it
is `severe`, one step up when it has been gone for longer and the better precision could carry the load of now. A
precision stays for at least the dwell time, and each return that did not last makes the next one wait twice as long.
"""

from dataclasses import dataclass, field, replace

from ebbflow.edge.engine.strain import Reading, Rules, Smoothed, fits, ready_for, severe, strain
from ebbflow.edge.engine.thread_fit import ThreadFit

REACT_S = 1.0
"""Seconds that evidence must last before the precision goes down."""
LASTED_DWELLS = 10
"""A return to a better precision has lasted after so many dwell times."""
_MOST_DOUBLINGS = 5
_BLOCK_S = 60.0
_LONGEST_BLOCK_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What an operator and a release allow."""

    offered: tuple[str, ...]
    """Precisions to choose from, best first."""
    max_threads: int
    pin: str = ""
    """Precision to hold on to; empty to choose."""
    dwell_s: float = 30.0
    """A precision stays for at least so long, in seconds."""
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True)
class Decision:
    """What should compute from now on."""

    precision: str
    threads: int
    reason: str
    """Why, in plain words."""


class Governor:
    """Decides for one engine. One thread at a time."""

    def __init__(self, policy: Policy) -> None:
        """Knows of no load yet."""
        self.policy = policy
        self._threads = ThreadFit(policy.max_threads)
        self._precision = _Precision(policy)

    def decide(self, reading: Reading, now_s: float) -> Decision:
        """Looks at one moment; may be called at any pace, best once or twice a second.

        Args:
            reading: what is so now, `reading.precision` and `reading.threads` included: a decision that could not be
                carried out is simply decided anew.
            now_s: on a clock that never goes back.
        """
        threads = self._threads.fit(reading.free_cores, reading.threads, now_s)
        precision, why = self._precision.choose(reading, now_s)
        return Decision(precision, threads, f"{why}; {_thread_words(reading, threads, self.policy.max_threads)}")

    def refused(self, precision: str, why: str, now_s: float) -> None:
        """A precision could not be made ready, such as for want of memory; it is left alone for a while."""
        self._precision.refused(precision, why, now_s)


class _Precision:
    """Chooses the precision: hysteresis, dwell times and what could not be had."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._smoothed = Smoothed()
        self._now_in = ""
        self._why = "nothing asks for less"
        self._wish: tuple[str, str] = ("", "")
        self._changed_s = self._raised_s = float("-inf")
        self._first_token_then_s: float | None = None
        self._strained_since_s: float | None = None
        self._calm_since_s: float | None = None
        self._doublings = 0
        self._blocked: dict[str, tuple[float, float, str]] = {}  # until when, for how long, why

    def choose(self, reading: Reading, now_s: float) -> tuple[str, str]:
        """Returns a precision and why."""
        self._notice(reading, now_s)
        smoothed = self._smoothed = self._smoothed.after(reading, now_s, self._policy.dwell_s / 3)
        if self._policy.pin:
            return self._pinned(reading, now_s)
        if len(self._policy.offered) == 1:
            return reading.precision, f"{reading.precision} is the only precision that is offered"
        evidence = strain(self._current_evidence(reading, now_s), smoothed, self._policy.rules)
        lower, higher = self._below(reading, now_s), self._above(reading, now_s)
        calm = not evidence and higher and ready_for(higher, reading, smoothed, self._policy.rules)
        self._strained_since_s = now_s if evidence and self._strained_since_s is None else self._strained_since_s
        self._strained_since_s = self._strained_since_s if evidence else None
        self._calm_since_s = (now_s if self._calm_since_s is None else self._calm_since_s) if calm else None
        if evidence and lower and self._lasted(self._strained_since_s, REACT_S, now_s):
            if severe(self._current_evidence(reading, now_s), smoothed, self._policy.rules):
                lower = self._lowest(reading, now_s)
            self._wish = (lower, evidence)
            return lower, f"{lower}: {evidence}"
        patience_s = self._policy.dwell_s * 2**self._doublings
        if calm and self._lasted(self._calm_since_s, patience_s, now_s):
            self._wish = (higher, "there is room for it again")
            return higher, f"{higher}: {self._wish[1]}"
        return reading.precision, self._as_it_is(reading, evidence, now_s)

    def refused(self, precision: str, why: str, now_s: float) -> None:
        """Leaves a precision alone for a while, each time for longer."""
        _, before_s, _ = self._blocked.get(precision, (0.0, 0.0, ""))
        block_s = min(_LONGEST_BLOCK_S, before_s * 2 or _BLOCK_S)
        self._blocked[precision] = (now_s + block_s, block_s, why)

    def _notice(self, reading: Reading, now_s: float) -> None:
        """Sees whether what was decided has come about."""
        before, self._now_in = self._now_in, reading.precision
        if before in {"", reading.precision}:
            return
        offered = self._policy.offered
        raised = offered.index(reading.precision) < offered.index(before)
        if raised:
            self._raised_s = now_s
        elif now_s - self._raised_s < LASTED_DWELLS * self._policy.dwell_s:
            self._doublings = min(self._doublings + 1, _MOST_DOUBLINGS)
        else:
            self._doublings = 0
        self._why = self._wish[1] if self._wish[0] == reading.precision else "it was asked for"
        self._changed_s, self._first_token_then_s = now_s, reading.first_token_s
        self._strained_since_s = self._calm_since_s = None
        self._blocked.pop(reading.precision, None)

    def _current_evidence(self, reading: Reading, now_s: float) -> Reading:
        """Takes out times to the first token that may still be those of the precision before."""
        then_s, window_s = self._first_token_then_s, self._policy.rules.first_token_window_s
        now_in_s = reading.first_token_s
        if now_s - self._changed_s >= window_s or then_s is None or now_in_s is None or now_in_s > then_s * 1.1:
            return reading
        return replace(reading, first_token_s=None)

    def _lasted(self, since_s: float | None, needed_s: float, now_s: float) -> bool:
        dwelt = now_s - self._changed_s >= self._policy.dwell_s
        return dwelt and since_s is not None and now_s - since_s >= needed_s

    def _below(self, reading: Reading, now_s: float) -> str:
        """The best precision under the present one that can be had."""
        worse = self._policy.offered[self._policy.offered.index(reading.precision) + 1 :]
        return next((precision for precision in worse if self._can_have(precision, reading, now_s)), "")

    def _lowest(self, reading: Reading, now_s: float) -> str:
        """The last precision under the present one that can be had."""
        worse = self._policy.offered[self._policy.offered.index(reading.precision) + 1 :]
        return next(precision for precision in reversed(worse) if self._can_have(precision, reading, now_s))

    def _above(self, reading: Reading, now_s: float) -> str:
        """The next precision over the present one that can be had."""
        better = self._policy.offered[: self._policy.offered.index(reading.precision)]
        return next((precision for precision in reversed(better) if self._can_have(precision, reading, now_s)), "")

    def _can_have(self, precision: str, reading: Reading, now_s: float) -> bool:
        return fits(precision, reading, self._policy.rules) and self._blocked.get(precision, (now_s,))[0] <= now_s

    def _pinned(self, reading: Reading, now_s: float) -> tuple[str, str]:
        pin, now_in = self._policy.pin, reading.precision
        if pin == now_in:
            return pin, f"{pin} is pinned"
        if pin not in self._policy.offered:
            return now_in, f"{pin} is pinned but not offered here, so {now_in} serves"
        if not self._can_have(pin, reading, now_s):
            return now_in, f"{pin} is pinned but cannot be had: {self._hindrance(pin, reading)}; {now_in} serves"
        self._wish = (pin, "it is pinned")
        return pin, f"{pin} is pinned"

    def _as_it_is(self, reading: Reading, evidence: str, now_s: float) -> str:
        now_in, offered = reading.precision, self._policy.offered
        said = f"{now_in}: {self._why}"
        worse = offered[offered.index(now_in) + 1 :]
        if evidence and not worse:
            return f"{now_in}: {evidence}, and nothing lower is offered"
        if evidence and not self._below(reading, now_s):
            return f"{now_in}: {evidence}, but {worse[0]} cannot be had: {self._hindrance(worse[0], reading)}"
        return said

    def _hindrance(self, precision: str, reading: Reading) -> str:
        if not fits(precision, reading, self._policy.rules):
            return "there is not enough memory to make it ready"
        return self._blocked[precision][2]


def _thread_words(reading: Reading, threads: int, most: int) -> str:
    word = "thread" if threads == 1 else "threads"
    if threads == most:
        return f"{threads} {word}, as many as are allowed"
    busy = max(0.0, reading.cores - reading.free_cores)
    return f"{threads} of {most} threads: other programs keep {busy:.1f} of {reading.cores:g} cores busy"
