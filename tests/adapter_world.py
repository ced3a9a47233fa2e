"""Plans of rounds of adapter updates for tiny students."""

import datetime as dt
import functools

import tiny_students
from feedback_world import NOW, signed_policy

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback.adapters import make_adapter_plan
from ebbflow.cloud.feedback.plans import Timing, make_plan
from ebbflow.common.privacy.calibration import complete_policy
from ebbflow.common.student.config import StudentConfig

DAY = dt.timedelta(days=1)
PLENTY = 10**6
"""Agents enough for any plan."""


@functools.cache
def config() -> StudentConfig:
    """The shape of a tiny student of two layers."""
    return tiny_students.config_of(tiny_students.train_tokenizer(), layers=2)


def policy(epsilon: float = 8.0) -> pb.PrivacyPolicy:
    """A policy that allows adapter updates."""
    return complete_policy(pb.PrivacyPolicy(epsilon=epsilon, allow_adapters=True))


def adapter_plan(
    shape: StudentConfig, epsilon: float = 8.0, cohort: int = PLENTY, release: int = 1, **settings: object
) -> pb.AdapterPlan:
    """What the cloud makes of an operator's settings."""
    wanted = round_pb2.AdapterSettings(**settings)  # type: ignore[arg-type]
    return make_adapter_plan(wanted, release, shape, policy(epsilon), cohort)


def round_plan(adapter: pb.AdapterPlan, epsilon: float = 8.0) -> pb.RoundPlan:
    """The round that asks for an adapter."""
    return make_plan("5c1e", "faq", signed_policy(policy(epsilon)), [], Timing(NOW, DAY, 7 * DAY), adapter=adapter)
