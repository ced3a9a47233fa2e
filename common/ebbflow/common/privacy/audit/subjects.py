"""The mechanisms that are audited: a plan, ordinary users, and one who pushes as hard as the release code lets anyone.

The plans are those that the cloud makes for a policy, except that nobody has signed them. What a user pushes with goes
through the same code as on a device from the point on where a user's bound is enforced: `vector.add_contributions` for
votes and metrics, `adapters.quantise` for adapter updates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy import adapters
from ebbflow.common.privacy.calibration import calibrate, complete_policy, variance_of
from ebbflow.common.privacy.plans import MIN_NULL_BINS
from ebbflow.common.privacy.release import privatise
from ebbflow.common.privacy.vector import AdapterContribution, Contribution, layout_of, plan_sensitivity_squared

User = Contribution | AdapterContribution
Release = Callable[[pb.RoundPlan, Sequence[User]], list[int]]
"""What is audited: turns the users of a device into its report."""

BINS = 4
MAX_USERS = 100
OTHERS = 20
"""Users of one bin who are in both worlds: so many that it would show if a new one pushed one of them out."""
DIMENSION = 24
TOO_MUCH = 10
"""The adapter's user pushes this many times harder than the clip norm."""


def release(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """The device's own release code."""
    return privatise(plan, users)


@dataclass(frozen=True)
class Subject:
    """One mechanism under one policy.

    Attributes:
        name: mechanism's name.
        plan: what the round asks.
        others: users who are in both worlds.
        canary: the user who is in one of them.
        directions: what to look along in a report, by name; weights of its cells.
    """

    name: str
    plan: pb.RoundPlan
    others: tuple[User, ...]
    canary: User
    directions: dict[str, dict[int, float]]

    def weights(self) -> npt.NDArray[np.float64]:
        """Unit vectors, one row for each direction: noise along each has the variance of one cell."""
        layout = layout_of(self.plan)
        rows = np.zeros((len(self.directions), layout.length - layout.nulls))
        for row, cells in zip(rows, self.directions.values(), strict=True):
            row[list(cells)] = list(cells.values())
        unit: npt.NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


def _plan(policy: pb.PrivacyPolicy, **parts: object) -> pb.RoundPlan:
    full = complete_policy(policy)
    plan = pb.RoundPlan(policy=full, max_users=MAX_USERS, **parts)  # type: ignore[arg-type]
    sensitivity = plan_sensitivity_squared(plan)
    plan.mechanism.CopyFrom(calibrate(full.epsilon, full.delta, full.rounds_per_window, sensitivity))
    return plan


def _bins() -> list[pb.Bin]:
    return [pb.Bin(bin_id=str(number), texts=[str(number)]) for number in range(BINS)]


def votes(policy: pb.PrivacyPolicy) -> Subject:
    """Votes alone, as in a default round."""
    seen = {
        "the user's bin": {0: 1.0},
        "two bins": {0: 1.0, 1: 1.0},
        "who is pushed out": {0: 1.0, 1: -1.0},
        "seen and failed": {0: 1.0, BINS: 1.0},
    }
    plan = _plan(policy, bins=_bins(), null_bins=MIN_NULL_BINS)
    return Subject("votes", plan, (Contribution(1),) * OTHERS, Contribution(0), seen)


def votes_with_metrics(policy: pb.PrivacyPolicy, caps: Sequence[int] = (2, 3)) -> Subject:
    """Votes and two counters, to which the user adds far more than their caps."""
    kinds = (pb.Metric.KIND_ACCEPTED, pb.Metric.KIND_FAILED)
    metrics = [pb.Metric(kind=kind, cap=cap) for kind, cap in zip(kinds, caps, strict=True)]
    plan = _plan(policy, bins=_bins(), null_bins=MIN_NULL_BINS, metrics=metrics)
    others = tuple(Contribution(at, metrics=(1, 0)) for at in (1, 2, 3))
    counters = {2 * BINS + at: float(cap) for at, cap in enumerate(caps)}
    directions = {
        "all of the user": {0: 1.0} | counters,
        "the user's bin": {0: 1.0},
        "the largest counter": {max(counters, key=counters.__getitem__): 1.0},
    }
    canary = Contribution(0, metrics=tuple(1000 * cap for cap in caps))
    return Subject("metrics", plan, others, canary, directions)


def adapter_updates(policy: pb.PrivacyPolicy) -> Subject:
    """Adapter updates, whose user pushes far beyond the clip norm."""
    full = complete_policy(policy)
    unit = calibrate(full.epsilon, full.delta, full.rounds_per_window)
    scale = adapters.choose_scale(variance_of(unit))
    adapter = pb.AdapterPlan(dimension=DIMENSION, clip_norm=1.0, scale=scale)
    plan = _plan(full, null_bins=adapters.MIN_NULL_BINS, adapter=adapter)
    pull = [math.cos(1.0 + at) for at in range(DIMENSION)]
    length = math.hypot(*pull)
    strong = [TOO_MUCH * value / length for value in pull]
    other = [0.3 * math.sin(1.0 + at) / length for at in range(DIMENSION)]
    others = tuple(adapters.quantise(change, 1.0, scale) for change in (other, other[::-1], strong[::-1]))
    canary = adapters.quantise(strong, 1.0, scale)
    directions = {"the user's pull": dict(enumerate(pull)), "its largest value": {pull.index(max(pull)): 1.0}}
    return Subject("adapters", plan, others, canary, directions)


SUBJECTS: dict[str, Callable[[pb.PrivacyPolicy], Subject]] = {
    "votes": votes,
    "metrics": votes_with_metrics,
    "adapters": adapter_updates,
}
"""Every mechanism by the name that an operator types."""
