"""Release code with one bug each, as an audit must find them: each takes a plan and users, as the real code does."""

import random
from collections.abc import Callable, Sequence
from fractions import Fraction

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.audit.subjects import OTHERS, Release, User, release
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.privacy.vector import AdapterContribution, Contribution, layout_of

MANY = 10


def changed(plan: pb.RoundPlan, **mechanism: int) -> pb.RoundPlan:
    """A copy of a plan with other noise than its policy asks for."""
    copy = pb.RoundPlan()
    copy.CopyFrom(plan)
    for field, value in mechanism.items():
        setattr(copy.mechanism, field, value)
    return copy


def with_variance(plan: pb.RoundPlan, variance: Fraction) -> pb.RoundPlan:
    return changed(plan, sigma_squared_numerator=variance.numerator, sigma_squared_denominator=variance.denominator)


def weaker_noise(divisor: Fraction) -> Release:
    """Sigma² divided by so much."""

    def build(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
        return release(with_variance(plan, variance_of(plan.mechanism) / divisor), users)

    return build


def no_clipping(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """Whatever a user did counts: ten votes, counters beyond their caps, an adapter ten times the clip norm."""
    loose = changed(plan)
    loose.adapter.scale *= MANY
    for metric in loose.metrics:
        metric.cap = 10**6
    if plan.HasField("adapter"):
        strong = [AdapterContribution([MANY * value for value in user.values]) for user in adapters_of(users)]
        return release(loose, strong)
    loose.ClearField("adapter")
    return release(loose, [user for user in users for _ in range(1 if plan.metrics else MANY)])


def adapters_of(users: Sequence[User]) -> list[AdapterContribution]:
    return [user for user in users if isinstance(user, AdapterContribution)]


def votes_of(users: Sequence[User]) -> list[Contribution]:
    return [user for user in users if isinstance(user, Contribution)]


def cap_per_bin(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """One vote in each bin that a user asked about, and not one alone: here in two."""
    bins = len(plan.bins)
    second = [Contribution((user.bin + 1) % bins, user.failed, (0,) * len(user.metrics)) for user in votes_of(users)]
    return release(plan, [*users, *second])


def counted_twice(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """Everybody is added twice: the sensitivity is double what the plan says."""
    return release(plan, [*users, *users])


def one_round_budget(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """Each round of the window is given the noise of a window that has one round: composition is forgotten."""
    policy, sensitivity = plan.policy, plan.mechanism.sensitivity_squared
    alone = calibrate(policy.epsilon, policy.delta, 1, sensitivity)
    return release(with_variance(plan, variance_of(alone)), users)


def metrics_forgotten(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """Noise for the votes alone, although counters go with them."""
    return release(with_variance(plan, variance_of(plan.mechanism) / plan.mechanism.sensitivity_squared), users)


def pushes_out(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """Draws a fixed number of users before the noise: one more pushes another one out."""
    return release(plan, random.sample(list(users), OTHERS))


def noise_reused() -> Release:
    """Draws noise for a hundred reports and takes one of them each time."""
    pool: dict[bytes, list[list[int]]] = {}

    def build(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
        key = plan.SerializeToString(deterministic=True)
        if key not in pool:
            pool[key] = [release(plan, []) for _ in range(100)]
        exact = release(with_variance(plan, Fraction(1, 10**4)), users)  # noise so weak that all of it is zero
        return [value + error for value, error in zip(exact, random.choice(pool[key]), strict=True)]

    return build


def one_noise_for_two_cells(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """Draws half of the noise and uses it for both halves of the null bins."""
    report, nulls = release(plan, users), layout_of(plan).nulls
    half = report[-nulls // 2 :]
    return report[:-nulls] + half + half


def nulls_alone(plan: pb.RoundPlan, users: Sequence[User]) -> list[int]:
    """Adds noise where the cloud looks, and nowhere else."""
    nulls = layout_of(plan).nulls
    return release(with_variance(plan, Fraction(1, 10**4)), users)[:-nulls] + release(plan, users)[-nulls:]


Bug = tuple[str, Callable[[], Release]]

HALVED: Bug = ("sigma halved", lambda: weaker_noise(Fraction(4)))
LESS: Bug = ("sigma / sqrt(2)", lambda: weaker_noise(Fraction(2)))
SLIGHTLY_LESS: Bug = ("sigma / 1.2", lambda: weaker_noise(Fraction(36, 25)))
UNCLIPPED: Bug = ("clip missing", lambda: no_clipping)
PER_BIN: Bug = ("cap per bin", lambda: cap_per_bin)
TWICE: Bug = ("sensitivity doubled", lambda: counted_twice)
NOT_COMPOSED: Bug = ("composition missing", lambda: one_round_budget)
FORGOTTEN: Bug = ("metrics forgotten", lambda: metrics_forgotten)
REUSED: Bug = ("noise reused", noise_reused)
SHARED: Bug = ("noise shared by cells", lambda: one_noise_for_two_cells)
BARE: Bug = ("noise in null bins alone", lambda: nulls_alone)
PUSHED: Bug = ("users drawn before the noise", lambda: pushes_out)

BUGS: dict[str, list[Bug]] = {
    "votes": [
        HALVED,
        LESS,
        SLIGHTLY_LESS,
        UNCLIPPED,
        PER_BIN,
        TWICE,
        NOT_COMPOSED,
        REUSED,
        SHARED,
        BARE,
        PUSHED,
    ],
    "metrics": [HALVED, LESS, SLIGHTLY_LESS, UNCLIPPED, FORGOTTEN, TWICE, NOT_COMPOSED, REUSED, SHARED, BARE],
    "adapters": [HALVED, LESS, SLIGHTLY_LESS, UNCLIPPED, TWICE, NOT_COMPOSED, REUSED, SHARED, BARE],
}
"""What can go wrong with each mechanism."""
