"""Who lives on after a round, and what a round says of a generation."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.api.v1.population_pb2 import Prompt
from ebbflow.cloud.feedback import evolution
from ebbflow.cloud.feedback.evolution import Votes
from ebbflow.common.privacy.weights import FLOOR_SHARE

COUNTS = st.lists(st.floats(0, 1e6), min_size=4, max_size=64).filter(lambda scores: sum(scores) > 1e-6)


def votes_of(seen: Sequence[float], noise_std: float = 10.0, near: float | None = None) -> Votes:
    return Votes(tuple(seen), (0.0,) * len(seen), noise_std, near)


def test_votes_are_read_off_a_rounds_aggregate() -> None:
    near, failed = pb.Metric(kind=pb.Metric.KIND_NEAR, cap=1), pb.Metric(kind=pb.Metric.KIND_FAILED, cap=3)
    said = round_pb2.Aggregate(
        bins=[round_pb2.BinEstimate(bin_id="1-0", seen=5, failed=2), round_pb2.BinEstimate(bin_id="1-1", seen=-1)],
        noise_std=2.5,
        metrics=[7.0, 4.0],
    )
    assert Votes.of(pb.RoundPlan(metrics=[failed, near]), said) == Votes((5.0, -1.0), (2.0, 0.0), 2.5, 4.0)
    assert Votes.of(pb.RoundPlan(metrics=[failed]), said).near is None


def test_a_winner_stands_three_standard_deviations_above_the_noise_by_a_cell_or_by_both() -> None:
    votes = Votes((29.0, 31.0, 22.0, 0.0), (0.0, 0.0, 22.0, 30.0), 10.0)
    assert votes.winners() == [1, 2, 3]


def test_prompts_that_are_each_lost_in_noise_inform_by_their_topic() -> None:
    votes = votes_of([25.0] * 4 + [-5.0] * 4)
    assert not votes.winners()
    assert votes.informs(["bank"] * 4 + ["trip"] * 4)
    assert not votes.informs([str(at) for at in range(8)])


def test_votes_that_failed_count_more() -> None:
    scores = Votes((100.0, 0.0), (0.0, 100.0), 1.0).scores()
    assert scores[1] > 1.9 * scores[0] > 100


def test_noise_is_not_taken_for_votes() -> None:
    rng = np.random.default_rng(0)
    votes = votes_of([*(500 + rng.normal(0, 20, 4)), *rng.normal(0, 20, 60)], 20.0)
    positive_part = sum(max(0.0, seen) for seen in votes.seen[4:])
    assert sum(votes.guesses()[4:]) < positive_part / 2
    assert evolution.quality(votes, 0.5).winners_share > 0.85


def test_quality_says_how_many_users_are_near_and_how_sure_that_is() -> None:
    quality = evolution.quality(votes_of([100.0] * 10, 1.0, 600.0), 0.25)
    assert quality.near_share == pytest.approx(0.6)
    assert quality.near_error == pytest.approx(math.hypot(1, 0.6 * math.sqrt(20)) / 1000)
    assert (quality.winners, quality.crowding) == (10, 0.25)
    assert quality.effective_prompts == pytest.approx(10, rel=0.01)
    assert evolution.quality(votes_of([100.0] * 10), 0.0).near_share < 0
    lost = evolution.quality(votes_of([1.0, -2.0], 10.0, 3.0), 0.0)
    assert (lost.near_share, lost.near_error) == (0.5, 0.5)


def test_crowding_is_the_cosine_to_the_nearest_neighbour() -> None:
    rows = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    assert evolution.crowding(rows) == pytest.approx(2 / 3)
    assert evolution.crowding(np.array([[1, 0], [0, 1]], np.float32)) == 0
    assert evolution.crowding(rows[:1]) == 1


@given(COUNTS, st.integers(4, 256), st.integers(0, 2**32))
def test_a_brood_is_as_large_as_was_asked_for_and_the_best_live_on(scores: list[float], size: int, seed: int) -> None:
    brood = evolution.breed(scores, size, seed)
    assert len(brood.elites) + sum(brood.litters.values()) + brood.strangers == size
    assert len(set(brood.elites)) == len(brood.elites) <= size * evolution.ELITE_SHARE
    assert brood.strangers >= 1
    mean = sum(scores) / len(scores)
    assert all(scores[at] >= evolution.LEAST_SCORE * mean for at in brood.elites)
    assert int(np.argmax(scores)) in {*brood.elites, *(at for at in range(len(scores)) if scores[at] == max(scores))}
    assert evolution.breed(scores, size, seed) == brood


@given(COUNTS, st.integers(0, 200), st.integers(0, 2**32))
def test_a_systematic_draw_gives_each_its_share_to_within_one(scores: list[float], count: int, seed: int) -> None:
    drawn = evolution.systematic(scores, count, np.random.default_rng(seed))
    assert drawn.sum() == count
    expected = np.asarray(scores) / sum(scores) * count
    assert (np.abs(drawn - expected) <= 1 + 1e-6).all()


@given(COUNTS, st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=64))
@example([0.0, 0.0, 1.0, 5e-324], [None, 3])
def test_weights_sum_to_one_and_families_share_what_they_earned(
    scores: list[float], families: list[int | None]
) -> None:
    weights = evolution.family_weights(scores, families)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0
    for family in set(families):
        assert len({weight for weight, each in zip(weights, families, strict=True) if each == family}) == 1
    known = {family for family in families if family is not None}
    if None in families and known and sum(scores[family] for family in known) > 0:
        strangers = sum(weight for weight, family in zip(weights, families, strict=True) if family is None)
        assert strangers == pytest.approx(FLOOR_SHARE)


def test_what_earlier_rounds_said_counts_on() -> None:
    fresh = [Prompt(weight=0.5), Prompt(weight=0.5)]
    assert evolution.remember([30.0, 10.0], fresh) == [30.0, 10.0]
    grown = [Prompt(weight=0.25, parent="1-0"), Prompt(weight=0.75, parent="1-1")]
    assert evolution.remember([30.0, 10.0], grown) == pytest.approx([20.0, 20.0])
