"""A sound plan, as the cloud makes it."""

import datetime as dt

import pytest
from feedback_world import signed_policy

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import Timing, make_plan

NOW = dt.datetime(2026, 11, 3, 12, tzinfo=dt.UTC)
TIMING = Timing(NOW, dt.timedelta(days=1), dt.timedelta(days=7))


@pytest.fixture
def plan() -> pb.RoundPlan:
    """Three bins, one metric, the default policy."""
    bins = [pb.Bin(bin_id=name, texts=[f"about {name}"]) for name in ("files", "dates", "networks")]
    metrics = [pb.Metric(kind=pb.Metric.KIND_FAILED, cap=2)]
    return make_plan("r1", "faq", signed_policy(), bins, TIMING, metrics=metrics, max_users=50)
