"""Which counters of a batch are outcomes, and which side of a comparison a device is on."""

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.acceptance import Evidence, Outcomes, judge, served_mostly
from ebbflow.cloud.feedback.shares import Noise
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.privacy.vector import Contribution, add_up, layout_of, metric_caps

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)
ACCEPTED, FAILED = pb.Metric.KIND_ACCEPTED, pb.Metric.KIND_FAILED
SILENT = Noise(0.0, 0.0)


def plan_of(*metrics: tuple[pb.Metric.Kind.ValueType, int]) -> pb.RoundPlan:
    return pb.RoundPlan(
        bins=[pb.Bin(bin_id=name) for name in ("files", "dates", "networks")],
        metrics=[pb.Metric(kind=kind, cap=cap) for kind, cap in metrics],
        null_bins=64,
        mechanism=calibrate(4.0, 1e-6, 4, 1 + sum(cap * cap for _, cap in metrics)),
    )


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=50))
def test_without_metrics_every_vote_is_an_outcome(votes: list[tuple[int, bool]]) -> None:
    plan = plan_of()
    vector = add_up(layout_of(plan), [], [Contribution(at, failed) for at, failed in votes])
    failed = sum(failed for _, failed in votes)
    assert Outcomes(plan).report(vector) == (len(votes) - failed, failed)


@pytest.mark.parametrize("order", [1, -1])
def test_metrics_of_both_kinds_are_outcomes_in_whatever_order(order: int) -> None:
    kinds = [(ACCEPTED, 2), (FAILED, 3)][::order]
    plan = plan_of(*kinds)
    users = [Contribution(0, metrics=(7, 1)[::order]), Contribution(1, metrics=(1, 9)[::order])]
    vector = add_up(layout_of(plan), metric_caps(plan), users)
    assert Outcomes(plan).report(vector) == (2 + 1, 1 + 3)
    assert Outcomes(plan).noise.cap == 3


def test_one_kind_of_metric_alone_is_no_share() -> None:
    plan = plan_of((ACCEPTED, 1))
    vector = add_up(layout_of(plan), metric_caps(plan), [Contribution(0, failed=True, metrics=(1,))])
    assert Outcomes(plan).report(vector) == (0, 1)


def test_noise_adds_up_over_the_cells_that_are_added_up() -> None:
    votes, metrics = plan_of(), plan_of((ACCEPTED, 1), (FAILED, 1))
    assert Outcomes(votes).noise.good == pytest.approx(3 * float(variance_of(votes.mechanism)))
    assert Outcomes(metrics).noise.failed == pytest.approx(float(variance_of(metrics.mechanism)))


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_batch_speaks_of_the_release_that_was_served_for_longer(before_s: int, after_s: int) -> None:
    since = NOW + dt.timedelta(seconds=before_s)
    assert served_mostly(NOW, since, since + dt.timedelta(seconds=after_s)) == (after_s > before_s)


def group(phase: int | None, good: int, failed: int, devices: int = 3) -> list[Evidence]:
    return [Evidence((good, failed), phase)] * devices


def test_a_phase_is_compared_with_who_serves_another_release() -> None:
    evidence = group(0, 500, 500) + group(1, 0, 1000) + group(None, 900, 100)
    found = judge(evidence, SILENT, 0, 0.1)
    assert found is not None
    assert found.rate == pytest.approx(0.5)
    assert found.elsewhere == pytest.approx(0.9)
    assert found.drop_significant
    assert found.informative
    tolerated = judge(evidence, SILENT, 0, 0.45)
    assert tolerated is not None
    assert not tolerated.drop_significant


@pytest.mark.parametrize(("ours", "others"), [(1, 9), (9, 1), (0, 9), (9, 0)])
def test_one_device_alone_is_no_comparison(ours: int, others: int) -> None:
    assert judge(group(0, 100, 900, ours) + group(None, 900, 100, others), SILENT, 0, 0.1) is None
