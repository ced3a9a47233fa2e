"""The one place where what users did becomes something that may leave the device."""

from collections.abc import Collection

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.vector import (
    AdapterContribution,
    Contribution,
    add_contributions,
    layout_of,
    value_limits,
)


def privatise(plan: pb.RoundPlan, contributions: Collection[Contribution | AdapterContribution]) -> list[int]:
    """Adds users up, adds noise to every cell, and cuts cells that are beyond the plan's limits.

    The cut comes after the noise, so it costs nothing.

    Args:
        plan: a checked plan.
        contributions: one for each user: votes, or changes where the plan asks for adapter updates.

    Raises:
        ValueError: a contribution does not fit the plan.
    """
    noise = DiscreteGaussian(variance_of(plan.mechanism)).sample(layout_of(plan).length)
    exact = add_contributions(plan, contributions)
    noisy = (value + error for value, error in zip(exact, noise, strict=True))
    limits = zip(noisy, *value_limits(plan), strict=True)
    return [min(max(value, least), most) for value, least, most in limits]
