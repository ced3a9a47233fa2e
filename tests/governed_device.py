"""A device on paper, for the governor: requests queue, an engine answers them, neighbours take cores. No clock."""

import math
from collections import deque
from dataclasses import dataclass, field, replace

from ebbflow.edge.engine.governor import Decision, Governor, Policy
from ebbflow.edge.engine.strain import BITS, Reading, Rules

TICK_S = 0.5
MIB = 2**20
ANSWER_TOKENS = 60.0
MOST_QUEUED = 64
WEIGHTS = {"bf16": 720 * MIB, "int8": 383 * MIB, "int4": 203 * MIB}
TOKENS_PER_S = {"bf16": 50.0, "int8": 90.0, "int4": 160.0}
"""Of one stream on one thread."""


@dataclass(frozen=True)
class Moment:
    """What the world does in one tick."""

    arrivals: float = 0.0
    """Requests a second."""
    others: float = 0.0
    """Cores that others would keep busy."""
    available_bytes: int = 8000 * MIB
    """Without what the engine's weights take."""
    temperature_c: float = 45.0
    """Of an idle engine."""
    warming_c: float = 0.0
    """Degrees more while bf16 computes, and less in proportion while fewer bytes are read."""
    battery_percent: float | None = None


@dataclass
class Device:
    """Runs a governor against a trace."""

    policy: Policy
    precision: str
    cores: int = 2
    total_bytes: int = 8000 * MIB
    threads: int = 0
    now_s: float = 0.0
    jobs: deque[tuple[float, float]] = field(default_factory=deque)
    """Arrival and tokens that are left, oldest first."""
    firsts: deque[tuple[float, float]] = field(default_factory=deque)
    changes: list[tuple[float, str]] = field(default_factory=list)
    thread_changes: list[tuple[float, int]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    served: float = 0.0

    def __post_init__(self) -> None:
        self.governor = Governor(self.policy)
        self.threads = self.threads or self.policy.max_threads
        self._owed = 0.0

        self._running = 0
        self._tokens: deque[tuple[float, float]] = deque()

    @property
    def capacity(self) -> int:
        return self.policy.rules.capacity

    def live(self, trace: list[Moment]) -> None:
        for moment in trace:
            self.tick(moment)

    def tick(self, moment: Moment) -> None:
        self.now_s += TICK_S
        self._arrive(moment)
        self._serve(moment)
        reading = self.reading(moment)
        decision = self.governor.decide(reading, self.now_s)
        self.readings.append(reading)
        self.decisions.append(decision)
        if decision.precision != self.precision:
            self.precision = decision.precision
            self.changes.append((self.now_s, decision.precision))
        if decision.threads != self.threads:
            self.threads = decision.threads
            self.thread_changes.append((self.now_s, decision.threads))

    def reading(self, moment: Moment) -> Reading:
        warmth = BITS[self.precision] / BITS["bf16"] if self._running else 0.0
        firsts = sorted(seconds for at_s, seconds in self.firsts if at_s > self.now_s - 60)
        return Reading(
            precision=self.precision,
            threads=self.threads,
            cores=self.cores,
            free_cores=self.free_cores(moment),
            running=self._running,
            queued=max(0, len(self.jobs) - self.capacity),
            tokens_per_s=sum(count for at_s, count in self._tokens if at_s > self.now_s - 5) / 5,
            first_token_s=firsts[int(0.95 * len(firsts))] if firsts else None,
            weights_bytes=WEIGHTS,
            cache_bytes=20 * MIB,
            memory_total_bytes=self.total_bytes,
            memory_available_bytes=max(0, moment.available_bytes - WEIGHTS[self.precision]),
            temperature_c=moment.temperature_c + warmth * moment.warming_c,
            discharging=moment.battery_percent is not None,
            battery_percent=moment.battery_percent,
        )

    def free_cores(self, moment: Moment) -> float:
        """What is measured: neighbours get their fair share beside our threads, and no more than they want."""
        wanted = self.threads if self.jobs else 0.0
        share = self.cores * moment.others / max(self.cores, moment.others + wanted) if moment.others else 0.0
        return max(0.0, self.cores - share)

    def _arrive(self, moment: Moment) -> None:
        self._owed += moment.arrivals * TICK_S
        for history in (self.firsts, self._tokens):
            while history and history[0][0] < self.now_s - 60:
                history.popleft()
        while self._owed >= 1:
            self._owed -= 1
            if len(self.jobs) < self.capacity + MOST_QUEUED:
                self.jobs.append((self.now_s, ANSWER_TOKENS))

    def _serve(self, moment: Moment) -> None:
        running = self._running = min(len(self.jobs), self.capacity)
        if not running:
            return
        fitting = min(self.threads, max(1, math.floor(self.free_cores(moment) + 0.5)))
        contended = 0.4 if self.threads > fitting else 1.0
        batch = running / (1 + 0.12 * (running - 1))
        each = TOKENS_PER_S[self.precision] * fitting**0.7 * contended * batch / running * TICK_S
        left: deque[tuple[float, float]] = deque()
        for index, (at_s, tokens) in enumerate(self.jobs):
            if index >= running:
                left.append((at_s, tokens))
                continue
            if tokens == ANSWER_TOKENS:
                self.firsts.append((self.now_s, self.now_s - at_s + TICK_S / 2))
            self.served += min(each, tokens)
            if tokens > each:
                left.append((at_s, tokens - each))
        self.jobs = left
        self._tokens.append((self.now_s, each * running))


def policy(offered: tuple[str, ...] = ("int8", "int4"), **more: object) -> Policy:
    rules = {name: more.pop(name) for name in list(more) if name in Rules.__dataclass_fields__}
    return replace(
        Policy(offered=offered, max_threads=2),
        rules=Rules(**rules),  # type: ignore[arg-type]
        **more,  # type: ignore[arg-type]
    )
