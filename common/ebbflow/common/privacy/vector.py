"""The layout of a report and the arithmetic by which users add to it.

A report is one vector of integers: votes seen by bin, votes failed by bin, metrics, null bins. One user adds exactly
one vote (a one in one cell of the first two parts) and to each metric at most its cap, whatever the user did; so adding
or removing a user changes the vector by an L2 norm of at most sqrt(1 + sum of caps²).
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
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

    @property
    def length(self) -> int:
        """Number of cells."""
        return 2 * self.bins + self.metrics + self.nulls

    def seen(self, report: Sequence[int]) -> Sequence[int]:
        """Votes whose answer was taken or not judged, by bin."""
        return report[: self.bins]

    def failed(self, report: Sequence[int]) -> Sequence[int]:
        """Votes whose answer failed, by bin."""
        return report[self.bins : 2 * self.bins]

    def metric_cells(self, report: Sequence[int]) -> Sequence[int]:
        """Metrics, in the plan's order."""
        return report[2 * self.bins : 2 * self.bins + self.metrics]

    def null_cells(self, report: Sequence[int]) -> Sequence[int]:
        """Null bins."""
        return report[2 * self.bins + self.metrics :]


def layout_of(plan: pb.RoundPlan) -> Layout:
    """Layout of the reports that a plan asks for."""
    return Layout(bins=len(plan.bins), metrics=len(plan.metrics), nulls=plan.null_bins)


def metric_caps(plan: pb.RoundPlan) -> list[int]:
    """What one user adds to each metric at most."""
    return [metric.cap for metric in plan.metrics]


def sensitivity_squared(caps: Iterable[int]) -> int:
    """Square of the largest L2 norm by which one user changes a report."""
    return 1 + sum(cap * cap for cap in caps)


@dataclass(frozen=True)
class Contribution:
    """What one user adds: one vote, and to each metric what the user did, before clipping."""

    bin: int
    failed: bool = False
    metrics: tuple[int, ...] = ()


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


def value_limits(plan: pb.RoundPlan) -> tuple[int, list[int]]:
    """Returns the least value of any cell and the largest value of each.

    Agents cut their noisy values there, which is post-processing. To draw `max_users` of the users before the noise
    instead would cost privacy: one user more could push another out, two cells would move, and the L2 norm of the
    change would be sqrt(2) and not 1.
    """
    layout = layout_of(plan)
    reach = tail(Fraction(variance_of(plan.mechanism)))
    votes = [plan.max_users + reach] * (2 * layout.bins)
    metrics = [plan.max_users * cap + reach for cap in metric_caps(plan)]
    return -reach, votes + metrics + [reach] * layout.nulls
