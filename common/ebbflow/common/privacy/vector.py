"""The layout of a report and the arithmetic by which users add to it.

A report is one vector of integers. Of votes it holds votes seen by bin, votes failed by bin, metrics and null bins: one
user adds exactly one vote (a one in one cell of the first two parts) and to each metric at most its cap, whatever the
user did; so adding or removing a user changes the vector by an L2 norm of at most sqrt(1 + sum of caps²). Of adapter
updates it holds the adapter's values and null bins: one user adds a vector whose L2 norm is at most the plan's scale.
"""

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.gaussian import tail


@dataclass(frozen=True)
class Layout:
    """Where things are in a report."""

    bins: int
    metrics: int
    nulls: int
    adapter: int = 0

    @property
    def length(self) -> int:
        """Number of cells."""
        return 2 * self.bins + self.metrics + self.adapter + self.nulls

    def seen(self, report: Sequence[int]) -> Sequence[int]:
        """Votes whose answer was taken or not judged, by bin."""
        return report[: self.bins]

    def failed(self, report: Sequence[int]) -> Sequence[int]:
        """Votes whose answer failed, by bin."""
        return report[self.bins : 2 * self.bins]

    def metric_cells(self, report: Sequence[int]) -> Sequence[int]:
        """Metrics, in the plan's order."""
        return report[2 * self.bins : 2 * self.bins + self.metrics]

    def adapter_cells(self, report: Sequence[int]) -> Sequence[int]:
        """The change of the adapter's values."""
        return report[2 * self.bins + self.metrics : self.length - self.nulls]

    def null_cells(self, report: Sequence[int]) -> Sequence[int]:
        """Null bins."""
        return report[self.length - self.nulls :]


def layout_of(plan: pb.RoundPlan) -> Layout:
    """Layout of the reports that a plan asks for."""
    return Layout(bins=len(plan.bins), metrics=len(plan.metrics), nulls=plan.null_bins, adapter=plan.adapter.dimension)


def metric_caps(plan: pb.RoundPlan) -> list[int]:
    """What one user adds to each metric at most."""
    return [metric.cap for metric in plan.metrics]


def sensitivity_squared(caps: Iterable[int]) -> int:
    """Square of the largest L2 norm by which one user changes a report of votes."""
    return 1 + sum(cap * cap for cap in caps)


def plan_sensitivity_squared(plan: pb.RoundPlan) -> int:
    """Square of the largest L2 norm by which one user changes the report that a plan asks for."""
    if plan.HasField("adapter"):
        return plan.adapter.scale**2
    return sensitivity_squared(metric_caps(plan))


@dataclass(frozen=True)
class Contribution:
    """What one user adds: one vote, and to each metric what the user did, before clipping."""

    bin: int
    failed: bool = False
    metrics: tuple[int, ...] = ()
    made_of: frozenset[str] | None = field(default=None, compare=False)
    """On a device, the ids of the user's interactions; without any of them left, it is not added up."""


@dataclass(frozen=True)
class AdapterContribution:
    """What one user adds in a round of adapter updates: a change of the adapter's values, in whole steps."""

    values: Sequence[int]
    made_of: frozenset[str] | None = field(default=None, compare=False)
    """As of a `Contribution`."""


def add_up(layout: Layout, caps: Sequence[int], contributions: Collection[Contribution]) -> list[int]:
    """Adds contributions, one for each user, into a vector without noise.

    The bound on one user holds here and nowhere else: metrics are clipped to 0 … cap, and a contribution has no more
    than one bin by its type.

    Raises:
        ValueError: a contribution names a bin that there is not.
    """
    vector = [0] * layout.length
    for user in contributions:
        if not 0 <= user.bin < layout.bins:
            raise ValueError(f"no bin {user.bin} among {layout.bins}")
        vector[user.bin + (layout.bins if user.failed else 0)] += 1
        for at, (amount, cap) in enumerate(zip(user.metrics, caps, strict=True), start=2 * layout.bins):
            vector[at] += min(max(amount, 0), cap)
    return vector


def add_changes(layout: Layout, most_squared: int, contributions: Collection[AdapterContribution]) -> list[int]:
    """Adds changes of an adapter, one for each user, into a vector without noise.

    The bound on one user holds here and nowhere else: a change whose sum of squares is above `most_squared`, counted in
    whole numbers, adds nothing. To raise instead would let one user decide whether the device reports.

    Raises:
        ValueError: a change has not as many values as the adapter.
    """
    sums = [0] * layout.adapter
    for user in contributions:
        values = [operator.index(value) for value in user.values]  # numpy's integers would wrap where they are squared
        if len(values) != layout.adapter:
            raise ValueError(f"a change of {len(values)} values for an adapter of {layout.adapter}")
        if sum(value * value for value in values) <= most_squared:
            sums = [total + value for total, value in zip(sums, values, strict=True)]
    return sums + [0] * layout.nulls


def add_contributions(plan: pb.RoundPlan, contributions: Collection[Contribution | AdapterContribution]) -> list[int]:
    """Adds up what a plan asks for, votes or changes, into a vector without noise.

    Raises:
        ValueError: a contribution is of the other kind, or does not fit the plan.
    """
    adapter = plan.HasField("adapter")
    votes = [user for user in contributions if isinstance(user, Contribution)]
    changes = [user for user in contributions if isinstance(user, AdapterContribution)]
    if votes if adapter else changes:
        raise ValueError("votes in a round of adapter updates, or the other way round")
    if adapter:
        return add_changes(layout_of(plan), plan_sensitivity_squared(plan), changes)
    return add_up(layout_of(plan), metric_caps(plan), votes)


def value_limits(plan: pb.RoundPlan) -> tuple[list[int], list[int]]:
    """Returns the least and the largest value of each cell.

    Agents cut their noisy values there, which is post-processing. To draw `max_users` of the users before the noise
    instead would cost privacy: one user more could push another out, two cells would move, and the L2 norm of the
    change would be sqrt(2) and not 1.
    """
    layout = layout_of(plan)
    reach = tail(Fraction(variance_of(plan.mechanism)))
    votes = [plan.max_users + reach] * (2 * layout.bins)
    metrics = [plan.max_users * cap + reach for cap in metric_caps(plan)]
    changes = [plan.max_users * plan.adapter.scale + reach] * layout.adapter
    nulls = [reach] * layout.nulls
    least = [-reach] * len(votes + metrics) + [-most for most in changes] + [-reach] * layout.nulls
    return least, votes + metrics + changes + nulls
