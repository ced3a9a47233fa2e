"""The real release code of the device, run many times with and without one user, and three broken builds of it."""

import datetime as dt
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from feedback_world import signed_policy

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.audit import mu_lower_bound, scale_fails
from ebbflow.cloud.feedback.plans import Timing, make_plan
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback import release, votes
from ebbflow.edge.feedback.interactions import Interaction

RUNS = 6_000
TIMING = Timing(dt.datetime(2026, 11, 3, tzinfo=dt.UTC), dt.timedelta(days=1), dt.timedelta(days=7))
DIRECTIONS = {"files": (1.0, 0.0), "dates": (0.0, 1.0)}
OTHERS = {b"anna": [Interaction("dates", b"anna")], b"ben": [Interaction("dates", b"ben")]}
CANARY = {b"canary": [Interaction("files", b"canary")] * 10}

World = dict[bytes, list[Interaction]]
Report = list[int]
Build = Callable[[pb.RoundPlan, World], Report]


def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    return np.array([DIRECTIONS[text] for text in texts])


def prompts_of(ids: Sequence[str]) -> dict[str, str]:
    return {id_: id_ for id_ in ids}


def make(epsilon: float) -> pb.RoundPlan:
    bins = [pb.Bin(bin_id=name, texts=[name]) for name in DIRECTIONS]
    policy = pb.PrivacyPolicy(epsilon=epsilon, rounds_per_window=1)
    return make_plan("r1", "faq", signed_policy(policy), bins, TIMING, max_users=50)


@pytest.fixture
def plan() -> pb.RoundPlan:
    return make(4.0)


def report(plan: pb.RoundPlan, world: World) -> Report:
    return release.privatise(plan, votes.contributions_of(plan, world, prompts_of, embed))


def runs(plan: pb.RoundPlan, world: World, build: Build = report, count: int = RUNS) -> npt.NDArray[np.float64]:
    return np.array([build(plan, world)[:4] for _ in range(count)], np.float64)


def claimed(plan: pb.RoundPlan) -> float:
    return 1 / math.sqrt(variance_of(plan.mechanism))


def test_the_correct_build_passes_both_tests(plan: pb.RoundPlan) -> None:
    without, with_ = runs(plan, OTHERS), runs(plan, OTHERS | CANARY)
    assert not scale_fails(without[:, 0], float(variance_of(plan.mechanism)))
    assert 0 < mu_lower_bound(without[:, 0], with_[:, 0]) <= claimed(plan)
    assert with_[:, 0].mean() - without[:, 0].mean() == pytest.approx(1.0, abs=0.15)


def test_half_the_noise_is_caught(plan: pb.RoundPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "DiscreteGaussian", lambda variance: DiscreteGaussian(variance / 4))
    without, with_ = runs(plan, OTHERS), runs(plan, OTHERS | CANARY)
    assert scale_fails(without[:, 0], float(variance_of(plan.mechanism)))
    assert mu_lower_bound(without[:, 0], with_[:, 0]) > claimed(plan)


def test_a_missing_cap_on_one_user_is_caught(plan: pb.RoundPlan) -> None:
    def every_interaction_votes(plan: pb.RoundPlan, world: World) -> Report:
        bins = votes.Bins(plan.bins, embed)
        cast = [Contribution(bins.nearest(each.id) or 0) for user in world.values() for each in user]
        return release.privatise(plan, cast)

    without, with_ = (runs(plan, world, every_interaction_votes, 1000)[:, 0] for world in (OTHERS, OTHERS | CANARY))
    assert mu_lower_bound(without, with_) > claimed(plan)


def test_drawing_a_fixed_number_of_users_would_be_caught() -> None:
    """Why the device cuts noisy cells and does not draw users: a new user would push another out, and both show."""
    plan = make(8.0)  # where 6,000 runs tell a norm of sqrt(2) from one of 1 by more than six deviations
    full = {bytes([i]): [Interaction("dates", bytes([i]))] for i in range(40)}

    def draws_forty(plan: pb.RoundPlan, world: World) -> Report:
        return counts_all(plan, dict(random.sample(list(world.items()), 40)))

    def counts_all(plan: pb.RoundPlan, world: World) -> Report:
        return release.privatise(plan, [Contribution(int(user != b"canary")) for user in world])

    def bound(build: Build) -> float:
        without, with_ = (runs(plan, world, build) for world in (full, full | CANARY))
        return mu_lower_bound(without[:, 0] - without[:, 1], with_[:, 0] - with_[:, 1])

    assert bound(draws_forty) > claimed(plan)
    assert bound(counts_all) <= claimed(plan)


def test_the_same_votes_never_give_the_same_report(plan: pb.RoundPlan) -> None:
    assert report(plan, OTHERS) != report(plan, OTHERS)
