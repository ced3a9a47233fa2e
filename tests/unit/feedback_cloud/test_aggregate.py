"""What a round says, and the mixture that follows."""

import math

import numpy as np
import pytest
from feedback_world import mixture_of
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback.aggregate import aggregate, pool
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.significance import is_informative
from ebbflow.common.privacy.weights import weights

COUNTS = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=20)


@given(COUNTS, st.floats(0, 1), st.floats(0, 10))
def test_weights_are_shares_with_a_floor(
    counts: list[tuple[float, float]], floor_share: float, failed_boost: float
) -> None:
    seen, failed = zip(*counts, strict=True)
    found = weights(seen, failed, failed_boost=failed_boost, floor_share=floor_share)
    assert math.fsum(found) == pytest.approx(1.0)
    assert min(found) >= floor_share / len(found) - 1e-12


def test_failed_votes_weigh_more() -> None:
    assert weights([30, 10], [0, 10], failed_boost=2, floor_share=0) == [0.5, 0.5]
    assert weights([30, 10], [0, 10], failed_boost=1, floor_share=0) == [0.6, 0.4]


def test_negative_estimates_get_the_floor_alone() -> None:
    assert weights([100, -50], [0, 0], floor_share=0.1) == pytest.approx([0.95, 0.05])


def test_where_nothing_stands_out_all_bins_are_equal() -> None:
    assert weights([-1, -2, 0, 0], [0, 1, 0, -3], failed_boost=1) == [0.25] * 4


@pytest.mark.parametrize(
    ("seen", "failed", "informative"),
    [([35.0, 0.0], [0.0, 0.0], False), ([35.2, 0.0], [0.0, 0.0], True), ([0.0, 0.0], [0.0, 36.0], True)],
    ids=["noise", "seen", "failed"],
)
def test_one_sum_of_six_must_stand_three_and_a_half_deviations_above_noise(
    seen: list[float], failed: list[float], informative: bool
) -> None:
    assert is_informative(seen, failed, 10.0) is informative


def test_two_halves_of_a_bin_may_stand_out_together() -> None:
    assert is_informative([26.0], [22.0], 10.0)
    assert not is_informative([22.0], [20.0], 10.0)


def test_a_round_of_noise_alone_is_hardly_ever_informative_however_many_bins_there_are() -> None:
    rng = np.random.default_rng(0)
    rounds = rng.normal(0.0, 7.0, (2000, 2, 150))
    alarms = sum(is_informative(seen.tolist(), failed.tolist(), 7.0) for seen, failed in rounds)
    assert alarms <= 10  # 2.7 are to be expected; with three deviations for each sum there would be some 900


def test_a_round_recovers_what_users_asked_for() -> None:
    mechanism = calibrate(4.0, 1e-6, 4)
    plan = pb.RoundPlan(
        bins=[pb.Bin(bin_id=name) for name in ("files", "dates")],
        metrics=[pb.Metric(kind=pb.Metric.KIND_ACCEPTED, cap=1)],
        null_bins=64,
        mechanism=mechanism,
    )
    truth = [40, 10, 0, 10, 25, *[0] * 64]
    sampler = DiscreteGaussian(variance_of(mechanism))
    reports = [[a + b for a, b in zip(truth, sampler.sample(69), strict=True)] for _ in range(100)]
    result = aggregate(plan, reports)
    deviation = math.sqrt(100 * variance_of(mechanism))
    assert result.noise_std == pytest.approx(deviation)
    assert result.informative
    assert [estimate.seen for estimate in result.bins] == pytest.approx([4000, 1000], abs=6 * deviation)
    assert [estimate.failed for estimate in result.bins] == pytest.approx([0, 1000], abs=6 * deviation)
    assert list(result.metrics) == pytest.approx([2500], abs=6 * deviation)
    assert mixture_of(result) == pytest.approx({"files": 0.05 + 0.9 * 4 / 7, "dates": 0.05 + 0.9 * 3 / 7}, abs=0.05)


def test_a_round_without_batches_says_nothing() -> None:
    plan = pb.RoundPlan(bins=[pb.Bin(bin_id="a"), pb.Bin(bin_id="b")], null_bins=64, mechanism=calibrate(4, 1e-6, 4))
    result = aggregate(plan, [])
    assert not result.informative
    assert result.noise_std == 0
    assert mixture_of(result) == {"a": 0.5, "b": 0.5}


def test_rounds_that_each_say_nothing_may_say_something_together() -> None:
    single = round_pb2.Aggregate(
        bins=[
            round_pb2.BinEstimate(bin_id="a", seen=30.0),
            round_pb2.BinEstimate(bin_id="b", seen=-1.0, failed=2.0),
        ],
        noise_std=10.0,
        batches=5,
    )
    assert not is_informative([30.0, -1.0], [0.0, 2.0], 10.0)
    pooled = pool([single] * 4)
    assert (pooled.noise_std, pooled.batches, pooled.informative) == (20.0, 20, True)
    assert [(bin_.seen, bin_.failed) for bin_ in pooled.bins] == [(120.0, 0.0), (-4.0, 8.0)]
    assert mixture_of(pooled)["a"] > 0.8


@given(st.lists(st.tuples(COUNTS, st.integers(1, 1000)), min_size=1, max_size=5), st.floats(0.1, 100.0))
def test_pooling_rounds_of_equal_noise_adds_counts_and_variances(
    rounds: list[tuple[list[tuple[float, float]], int]], agent_noise_std: float
) -> None:
    width = min(len(counts) for counts, _ in rounds)
    results = [closed(counts[:width], agent_noise_std, batches) for counts, batches in rounds]
    pooled = pool(results)
    assert pooled.noise_std**2 == pytest.approx(sum(result.noise_std**2 for result in results))
    for at, bin_ in enumerate(pooled.bins):
        assert bin_.seen == pytest.approx(math.fsum(counts[at][0] for counts, _ in rounds), rel=1e-6, abs=1e-3)
        assert bin_.failed == pytest.approx(math.fsum(counts[at][1] for counts, _ in rounds), rel=1e-6, abs=1e-3)
    assert math.fsum(mixture_of(pooled).values()) == pytest.approx(1.0)


def closed(counts: list[tuple[float, float]], agent_noise_std: float, batches: int) -> round_pb2.Aggregate:
    return round_pb2.Aggregate(
        bins=[
            round_pb2.BinEstimate(bin_id=str(at), seen=seen, failed=failed) for at, (seen, failed) in enumerate(counts)
        ],
        noise_std=agent_noise_std * math.sqrt(batches),
        batches=batches,
    )


@given(st.floats(1.0, 100.0))
def test_a_loud_round_never_drowns_a_quiet_one(louder: float) -> None:
    quiet, loud = closed([(900.0, 0.0), (100.0, 0.0)], 2.0, 100), closed([(0.0, 0.0), (0.0, 0.0)], 2.0 * louder, 100)
    pooled = pool([loud, quiet])
    assert quiet.noise_std <= pooled.noise_std <= math.sqrt(2) * quiet.noise_std + 1e-9
    assert (pooled.bins[0].seen, pooled.informative) == (900.0, True)


def test_a_round_that_nobody_answered_changes_nothing() -> None:
    quiet = closed([(900.0, 0.0), (100.0, 0.0)], 2.0, 100)
    empty = closed([(0.0, 0.0), (0.0, 0.0)], 2.0, 0)
    assert pool([quiet, empty]) == pool([quiet]) == pool([empty, quiet])
    assert not pool([empty, empty]).informative
