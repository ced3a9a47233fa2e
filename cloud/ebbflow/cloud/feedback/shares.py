"""Compares the share of good outcomes of two groups of devices by their privatised counters. Decisions without IO.

Every counter carries noise of a known variance, so how far a share can be off is arithmetic, not guesswork: each
group's share gets an interval, and the two intervals one of their difference.

- The interval of a share is the set of shares p whose `good - p * (good + failed)` is as near to zero as noise and
  chance allow: Fieller's interval (1954), which stays right where the sum below the line is little more than noise.
  Without noise it is Wilson's (1927).
- The interval of the difference joins both by the distances from their estimates (Zou and Donner 2008, "MOVER").
- Devices differ by more than chance says: what their own counters scatter beyond noise and chance widens everything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TWO_SIDED = 1.959964
"""Standard deviations of an interval that holds the truth 95 times in 100."""
ONE_SIDED = 1.644854
"""The same for a bound on one side."""
POWER = 0.841621
"""Standard deviations below which the truth lies 8 times in 10."""

LEAST_DEVICES = 2
"""Devices on either side, below which a difference may be the device's and not the release's."""

Report = tuple[int, int]
"""One batch's noisy counters: good outcomes, failed outcomes."""


@dataclass(frozen=True)
class Noise:
    """What is known of one batch's counters."""

    good: float
    """Variance of the noise on the counter of good outcomes."""
    failed: float
    """The same on the counter of failed ones."""
    cap: int = 1
    """Outcomes that one user adds at most."""


@dataclass(frozen=True)
class Interval:
    """An estimate, and where the truth lies."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two groups' shares of good outcomes, and how much lower the first is."""

    share: float
    elsewhere: float
    drop: Interval
    """How much lower, with the interval that holds the truth 95 times in 100."""
    least_drop: float
    """What the drop exceeds 95 times in 100."""

    def exceeds(self, tolerance: float) -> bool:
        """Whether the drop is larger than tolerated, at a one-sided level of 5 per cent."""
        return self.least_drop > tolerance

    def informs(self, tolerance: float) -> bool:
        """Whether the counters say enough: the interval is narrower than the tolerance, or the tolerance outside it."""
        return self.drop.high - self.drop.low < tolerance or not self.drop.low <= tolerance <= self.drop.high


def compare(ours: Sequence[Report], others: Sequence[Report], noise: Noise) -> Comparison:
    """Compares two groups of batches of one round.

    Args:
        ours: of the devices in question.
        others: of the devices that they are compared with.
        noise: what every one of these batches carries.
    """
    groups = _Sums.of(ours), _Sums.of(others)
    scatter = _Scatter.of(((groups[0], ours), (groups[1], others)), noise)
    two_sided, one_sided = (
        [sums.interval(noise, scatter.widen(deviations)) for sums in groups] for deviations in (TWO_SIDED, ONE_SIDED)
    )
    least_drop = _difference(one_sided[1], one_sided[0]).low
    return Comparison(groups[0].share, groups[1].share, _difference(two_sided[1], two_sided[0]), least_drop)


def agents_needed(drop: float, tolerance: float, rate: float, users: float, noise: Noise, others: float = 9.0) -> int:
    """How many agents must serve a release for a drop of the share of good outcomes to be seen 8 times in 10.

    Args:
        drop: by how much the share really falls.
        tolerance: the drop that is allowed; below `drop`.
        rate: the share elsewhere.
        users: users of each agent who have an outcome in the round.
        noise: of one batch.
        others: agents to compare with, for each agent that serves the release.
    """
    wanted = (drop - tolerance) / (ONE_SIDED + POWER)
    ours, theirs = (_variance(share, users, noise) for share in (rate - drop, rate))
    return max(LEAST_DEVICES, math.ceil((ours + theirs / others) / wanted**2))


def _variance(share: float, users: float, noise: Noise) -> float:
    """Variance of the share that one agent's counters give."""
    on_counters = noise.good * (1 - share) ** 2 + noise.failed * share**2
    return on_counters / users**2 + noise.cap * share * (1 - share) / users


@dataclass(frozen=True)
class _Sums:
    """Sums of a group's counters."""

    good: int
    failed: int
    batches: int

    @classmethod
    def of(cls, reports: Sequence[Report]) -> "_Sums":
        return cls(sum(good for good, _ in reports), sum(failed for _, failed in reports), len(reports))

    @property
    def outcomes(self) -> int:
        return self.good + self.failed

    @property
    def share(self) -> float:
        """The estimate, within 0 to 1; one half where the counters hold nothing but noise."""
        return min(1.0, max(0.0, self.good / self.outcomes)) if self.outcomes > 0 else 0.5

    def interval(self, noise: Noise, squared_deviations: float) -> Interval:
        """Shares p for which (good - p * outcomes)^2 is at most so many variances; 0 to 1 where all of them are."""
        whole = Interval(self.share, 0.0, 1.0)
        if self.outcomes <= 0:
            return whole
        chance = squared_deviations * noise.cap * self.outcomes
        on_good, on_failed = (squared_deviations * self.batches * each for each in (noise.good, noise.failed))
        # a p^2 + b p + c <= 0
        a = self.outcomes**2 + chance - on_good - on_failed
        b = 2 * on_good - chance - 2 * self.good * self.outcomes
        c = self.good**2 - on_good
        inside = b * b - 4 * a * c
        if a <= 0 or inside < 0:
            return whole
        low, high = ((-b + sign * math.sqrt(inside)) / (2 * a) for sign in (-1, 1))
        if low > 1 or high < 0:
            return whole
        low, high = max(0.0, low), min(1.0, high)
        return Interval(min(high, max(low, self.share)), low, high)


def _difference(left: Interval, right: Interval) -> Interval:
    """The interval of left - right."""
    value = left.value - right.value
    if 1.0 in {left.high - left.low, right.high - right.low}:  # one says nothing: no estimate to measure from
        return Interval(value, left.low - right.high, left.high - right.low)
    below = math.hypot(left.value - left.low, right.high - right.value)
    above = math.hypot(left.high - left.value, right.value - right.low)
    return Interval(value, max(-1.0, value - below), min(1.0, value + above))


@dataclass(frozen=True)
class _Scatter:
    """How much the devices' own counters scatter."""

    factor: float
    """Over what noise and chance make of them, as a factor on the variance; at least 1."""
    freedom: int
    """Counters that it was learnt from."""

    @classmethod
    def of(cls, groups: Sequence[tuple[_Sums, Sequence[Report]]], noise: Noise) -> "_Scatter":
        total, freedom = 0.0, 0
        for sums, reports in groups:
            share = sums.share
            chance = noise.cap * max(0.0, sums.outcomes / max(1, sums.batches)) * share * (1 - share)
            expected = noise.good * (1 - share) ** 2 + noise.failed * share**2 + chance
            if expected > 0 and reports:
                total += math.fsum(((1 - share) * good - share * failed) ** 2 for good, failed in reports) / expected
                freedom += len(reports) - 1
        return cls(max(1.0, total / freedom), freedom) if freedom > 0 else cls(1.0, 0)

    def widen(self, deviations: float) -> float:
        """Squared deviations that hold as much as `deviations` do of a normal law.

        What was learnt from few counters follows Student's law: its quantile by Cornish and Fisher's first term.
        """
        if self.factor > 1:
            deviations *= 1 + (deviations * deviations + 1) / (4 * self.freedom)
        return deviations * deviations * self.factor
