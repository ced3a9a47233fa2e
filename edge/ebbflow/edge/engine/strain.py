"""What speaks for a lower precision, and when a better one could carry the load. Pure functions of what is known."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

BITS = {"bf16": 16.0, "int8": 8.5, "int4": 4.5}
"""Of memory that a weight takes, scales included. A decoding step reads every weight once, so its time is in proportion
at worst; where much is computed for each weight read, as in prompts and batches, precisions differ by less."""
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The thresholds. Each of those that bring the precision down lies apart from the one that lets it up again."""

    latency_goal_s: float | None = None
    """The 95th percentile of the time to the first token should stay below; None for no goal."""
    memory_limit_bytes: int | None = None
    """Of weights and caches together, the precision that is being made ready included."""
    capacity: int = 8
    """Sequences that the engine takes in one batch."""
    first_token_window_s: float = 60.0
    """Seconds over which `Reading.first_token_s` looks back."""
    cooled_c: float = 8.0
    """Degrees below the limit at which a device has cooled down."""
    battery_low_percent: float = 20.0
    battery_well_percent: float = 30.0
    memory_short_share: float = 0.05
    """Of the device's memory; less than that available is short, twice as much beside what is needed is ample."""
    memory_least_bytes: int = 64 * _MIB
    """What must stay available when another precision has been made ready."""
    goal_share: float = 0.8
    """Share of the latency goal that a better precision may be expected to take."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One moment of an engine and its device."""

    precision: str
    threads: int
    cores: float
    """That this process may use."""
    free_cores: float
    """Of them, what other programs leave to this one."""
    running: int = 0
    queued: int = 0
    tokens_per_s: float = 0.0
    """Of answers, over the last few seconds; with none, and nothing that runs, the engine is idle."""
    first_token_s: float | None = None
    """95th percentile over the last while."""
    weights_bytes: Mapping[str, int] = field(default_factory=dict)
    """By precision, of all that are offered; as good as is known."""
    cache_bytes: int = 0
    """Of keys and values that sequences hold; what is kept beyond them makes room by itself."""
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    temperature_c: float | None = None
    hot_c: float = 80.0
    """Temperature at which the device begins to slow down."""
    discharging: bool = False
    battery_percent: float | None = None


@dataclass(frozen=True)
class Smoothed:
    """Averages of the load, in which a moment without requests does not look like the end of them."""

    running: float = 0.0
    queued: float = 0.0
    at_s: float | None = None

    def after(self, reading: Reading, now_s: float, over_s: float) -> "Smoothed":
        """Returns the averages with one reading more; of what runs over some `over_s` seconds, of the queue over 2."""
        if self.at_s is None:
            return Smoothed(at_s=now_s)
        passed_s = max(0.0, now_s - self.at_s)
        running = self.running + _weight(passed_s, over_s) * (reading.running - self.running)
        queued = self.queued + _weight(passed_s, 2.0) * (reading.queued - self.queued)
        return Smoothed(running, queued, now_s)


def _weight(passed_s: float, over_s: float) -> float:
    return 1.0 - math.exp(-passed_s / over_s)


def short_bytes(reading: Reading, rules: Rules) -> float:
    """Returns below how many available bytes memory is short."""
    return rules.memory_short_share * reading.memory_total_bytes


def fits(precision: str, reading: Reading, rules: Rules) -> bool:
    """Whether a precision can be made ready beside the one that computes."""
    needed = reading.weights_bytes[precision]
    held = reading.weights_bytes[reading.precision] + reading.cache_bytes
    within = rules.memory_limit_bytes is None or held + needed <= rules.memory_limit_bytes
    return within and needed + rules.memory_least_bytes <= reading.memory_available_bytes


def strain(reading: Reading, smoothed: Smoothed, rules: Rules) -> str:
    """Says in plain words what speaks for a lower precision; empty if nothing does.

    Only a lack of memory counts while nothing is asked: an idle engine makes no heat and keeps nobody waiting.
    """
    if reading.memory_available_bytes < short_bytes(reading, rules):
        return f"only {reading.memory_available_bytes // _MIB} MiB of the device's memory are free"
    if not (reading.running or reading.tokens_per_s):
        return ""
    return _strain_of_device(reading, rules) or _strain_of_load(reading, smoothed, rules)


def _strain_of_device(reading: Reading, rules: Rules) -> str:
    if reading.temperature_c is not None and reading.temperature_c >= reading.hot_c:
        return f"the device is at {reading.temperature_c:.0f} °C and slows down at {reading.hot_c:.0f} °C"
    if _battery_at_most(reading, rules.battery_low_percent):
        return f"the battery is at {reading.battery_percent:.0f} %"
    return ""


def _strain_of_load(reading: Reading, smoothed: Smoothed, rules: Rules) -> str:
    if smoothed.queued >= max(1.0, rules.capacity / 4):
        return f"{smoothed.queued:.0f} requests wait for a place"
    goal_s = rules.latency_goal_s
    if goal_s and reading.first_token_s is not None and reading.first_token_s > goal_s:
        return f"the first token takes {reading.first_token_s:.2g} s and should take {goal_s:.2g} s"
    return ""


def severe(reading: Reading, smoothed: Smoothed, rules: Rules) -> bool:
    """Whether a single step down would not do: half a batch waits, or the first token takes twice what it should.

    Each step costs the time in which weights are made ready and a dwell, and meanwhile the queue grows.
    """
    goal_s, first_s = rules.latency_goal_s, reading.first_token_s
    return smoothed.queued >= rules.capacity / 2 or bool(goal_s and first_s is not None and first_s > 2 * goal_s)


def ready_for(precision: str, reading: Reading, smoothed: Smoothed, rules: Rules) -> bool:
    """Whether a better precision could carry what is asked now, with something to spare."""
    slower = BITS[precision] / BITS[reading.precision]
    spare = reading.memory_available_bytes - reading.weights_bytes[precision]
    goal_s, first_s = rules.latency_goal_s, reading.first_token_s
    return (
        smoothed.queued < 0.5  # noqa: PLR2004 - less than every other moment somebody waits
        and smoothed.running * slower <= rules.capacity / 2
        and (not goal_s or first_s is None or first_s * slower <= rules.goal_share * goal_s)
        and (reading.temperature_c is None or reading.temperature_c <= reading.hot_c - rules.cooled_c)
        and not _battery_at_most(reading, rules.battery_well_percent)
        and spare >= 2 * short_bytes(reading, rules)
    )


def _battery_at_most(reading: Reading, percent: float) -> bool:
    return reading.discharging and reading.battery_percent is not None and reading.battery_percent <= percent
