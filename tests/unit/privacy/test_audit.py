"""From what users did to what leaves: the device's own votes and release code, with and without one busy user."""

import datetime as dt
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from feedback_world import signed_policy

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.cloud.feedback.plans import Timing, make_plan
from ebbflow.common.privacy.audit.bounds import mu_lower_bound, scale_fails
from ebbflow.common.privacy.audit.claims import noise_moments, round_mu
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.release import privatise
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback import votes
from ebbflow.edge.feedback.interactions import Interaction

RUNS = 3000
TIMING = Timing(dt.datetime(2026, 11, 3, tzinfo=dt.UTC), dt.timedelta(days=1), dt.timedelta(days=7))
DIRECTIONS = {"files": (1.0, 0.0), "dates": (0.0, 1.0)}
OTHERS = {b"anna": [Interaction("dates", b"anna")], b"ben": [Interaction("dates", b"ben")]}
CANARY = {b"canary": [Interaction("files", b"canary", rpb.OUTCOME_ACCEPTED)] * 10}
METRICS = [pb.Metric(kind=pb.Metric.KIND_ACCEPTED, cap=2)]

World = dict[bytes, list[Interaction]]
Report = list[int]
Build = Callable[[pb.RoundPlan, World], Report]


def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    return np.array([DIRECTIONS[text] for text in texts])


def prompts_of(ids: Sequence[str]) -> dict[str, str]:
    return {id_: id_ for id_ in ids}


def make(metrics: Sequence[pb.Metric] = ()) -> pb.RoundPlan:
    bins = [pb.Bin(bin_id=name, texts=[name]) for name in DIRECTIONS]
    policy = pb.PrivacyPolicy(epsilon=8.0, rounds_per_window=1)
    return make_plan("r1", "faq", signed_policy(policy), bins, TIMING, metrics=metrics, max_users=50)


def report(plan: pb.RoundPlan, world: World) -> Report:
    return privatise(plan, votes.contributions_of(plan, world, prompts_of, embed))


def every_interaction_votes(plan: pb.RoundPlan, world: World) -> Report:
    bins = votes.Bins(plan.bins, embed)
    cast = []
    for interactions in world.values():
        found = [bins.nearest(each.id) for each in interactions]
        cast += [Contribution(nearest) for nearest in found if nearest is not None]
    return privatise(plan, cast)


def runs(plan: pb.RoundPlan, world: World, build: Build = report, count: int = RUNS) -> npt.NDArray[np.float64]:
    return np.array([build(plan, world)[:5] for _ in range(count)], np.float64)


@pytest.mark.parametrize("metrics", [[], METRICS], ids=["votes", "with a counter"])
def test_the_device_s_path_passes_whatever_its_user_did(metrics: list[pb.Metric]) -> None:
    plan = make(metrics)
    along = np.array([1.0, 0.0, 0.0, 0.0, 2.0 if metrics else 0.0])
    without, with_ = (runs(plan, world) @ along for world in (OTHERS, OTHERS | CANARY))
    variance, kurtosis = noise_moments(variance_of(plan.mechanism))
    assert not scale_fails(without, variance * float(along @ along), kurtosis=kurtosis)
    assert 0.6 < mu_lower_bound(without, with_) <= round_mu(plan)
    assert with_.mean() - without.mean() == pytest.approx(along @ along, rel=0.15)


def test_a_vote_for_every_interaction_would_be_caught() -> None:
    plan = make()
    without, with_ = (runs(plan, world, every_interaction_votes, 1000)[:, 0] for world in (OTHERS, OTHERS | CANARY))
    assert mu_lower_bound(without, with_) > round_mu(plan)


def test_the_same_votes_never_give_the_same_report() -> None:
    assert report(make(), OTHERS) != report(make(), OTHERS)
