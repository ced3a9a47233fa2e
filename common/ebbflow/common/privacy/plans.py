"""What makes a round's plan sound. The cloud asks before it signs, every agent again before it answers."""

import datetime as dt
from fractions import Fraction

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import accounting
from ebbflow.common.privacy.adapters import check_adapter
from ebbflow.common.privacy.calibration import MAX_DELTA, MAX_EPSILON, MAX_ROUNDS, variance_of
from ebbflow.common.privacy.composition import covers, within
from ebbflow.common.privacy.gaussian import MAX_VARIANCE
from ebbflow.common.privacy.vector import plan_sensitivity_squared
from ebbflow.common.privacy.windows import window_name

MAX_BINS = 256
MIN_NULL_BINS = 64
MAX_NULL_BINS = 1024
MAX_METRICS = 8
MAX_CAP = 1000
MAX_USERS = 1_000_000
MAX_TEXTS_PER_BIN = 150
MAX_WINDOW_DAYS = 366
MAX_RETENTION_DAYS = 3660
MAX_NEAR_MICRO = 1_000_000
EPSILON_TOLERANCE = 1e-9

_METRIC_KINDS = (pb.Metric.KIND_ACCEPTED, pb.Metric.KIND_FAILED, pb.Metric.KIND_NEAR)


def _unsound(why: str, message: str) -> EbbflowError:
    return EbbflowError(Reason.PLAN_INVALID, message, why=why)


def _check_shape(plan: pb.RoundPlan) -> None:
    for name, collection in ((plan.round, "rounds"), (plan.student, "students")):
        names.parse(name, collection)
    if not 1 <= plan.max_users <= MAX_USERS:
        raise _unsound("max_users", f"max_users must be 1 to {MAX_USERS}")
    if plan.null_bins > MAX_NULL_BINS:
        raise _unsound("null_bins", f"{MAX_NULL_BINS} null bins are the most")
    if plan.HasField("adapter"):
        check_adapter(plan)
    else:
        _check_votes(plan)


def _check_votes(plan: pb.RoundPlan) -> None:
    ids = [bin_.bin_id for bin_ in plan.bins]
    near = [metric for metric in plan.metrics if metric.kind == pb.Metric.KIND_NEAR]
    limits = (
        ("bins", 1 <= len(ids) <= MAX_BINS, f"1 to {MAX_BINS} bins are needed, not {len(ids)}"),
        ("bins", len(set(ids)) == len(ids) and "" not in ids, "every bin needs a name of its own"),
        ("texts", all(_has_texts(bin_) for bin_ in plan.bins), f"a bin needs 1 to {MAX_TEXTS_PER_BIN} texts"),
        ("null_bins", plan.null_bins >= MIN_NULL_BINS, f"{MIN_NULL_BINS} null bins are the least"),
        ("metrics", len(plan.metrics) <= MAX_METRICS, f"{MAX_METRICS} metrics are the most"),
        ("metrics", all(_is_metric(metric) for metric in plan.metrics), "a metric's kind or cap makes no sense"),
        ("measure", plan.measure in pb.RoundPlan.Measure.values(), "a way to liken texts that nobody knows"),
        ("near", not near or 1 <= plan.near_micro <= MAX_NEAR_MICRO, f"near_micro must be 1 to {MAX_NEAR_MICRO}"),
    )
    for why, holds, message in limits:
        if not holds:
            raise _unsound(why, message)


def _has_texts(bin_: pb.Bin) -> bool:
    return 1 <= len(bin_.texts) <= MAX_TEXTS_PER_BIN and all(bin_.texts)


def _is_metric(metric: pb.Metric) -> bool:
    most = 1 if metric.kind == pb.Metric.KIND_NEAR else MAX_CAP
    return metric.kind in _METRIC_KINDS and 1 <= metric.cap <= most


def policy_fault(policy: pb.PrivacyPolicy) -> tuple[str, str] | None:
    """Returns the field of a complete policy that makes no sense, and what it should be; None if all do."""
    limits = (
        ("epsilon", 0 < policy.epsilon <= MAX_EPSILON, f"above 0 and at most {MAX_EPSILON:g}"),
        ("delta", 0 < policy.delta <= MAX_DELTA, f"above 0 and at most {MAX_DELTA:g}"),
        ("window_days", 1 <= policy.window_days <= MAX_WINDOW_DAYS, f"1 to {MAX_WINDOW_DAYS}"),
        ("rounds_per_window", 1 <= policy.rounds_per_window <= MAX_ROUNDS, f"1 to {MAX_ROUNDS}"),
        ("retention_days", policy.retention_days <= MAX_RETENTION_DAYS, f"1 to {MAX_RETENTION_DAYS}"),
    )
    return next(((field, words) for field, holds, words in limits if not holds), None)


def _check_policy(plan: pb.RoundPlan) -> None:
    if fault := policy_fault(plan.policy):
        raise _unsound("policy", f"the privacy policy's {fault[0]} must be {fault[1]}")
    if plan.HasField("adapter") and not plan.policy.allow_adapters:
        raise _unsound("adapters", "the privacy policy does not allow adapter updates")


def _is_cost(rho_nano: int, variance: Fraction, sensitivity_squared: int) -> bool:
    if sensitivity_squared == 1:
        return rho_nano == accounting.rho_nano(variance, 1)
    return rho_nano > 0 and covers(rho_nano, variance, sensitivity_squared)


def _check_mechanism(plan: pb.RoundPlan) -> None:
    mechanism, policy = plan.mechanism, plan.policy
    variance, sensitivity = variance_of(mechanism), mechanism.sensitivity_squared
    if mechanism.kind != pb.Mechanism.KIND_DISCRETE_GAUSSIAN or not 0 < variance <= MAX_VARIANCE:
        raise _unsound("mechanism", "the mechanism is unknown or its variance out of range")
    if sensitivity != plan_sensitivity_squared(plan):
        raise _unsound("sensitivity", "the sensitivity is not that of what the plan asks of one user")
    if not _is_cost(mechanism.rho_nano, variance, sensitivity):
        raise _unsound("rho", "the cost is not that of the variance")
    rounds = policy.rounds_per_window
    if mechanism.rho_nano * rounds > policy.rho_cap_nano:
        raise _unsound("rho_cap", "the window's rounds cost more than its cap")
    allowed = policy.epsilon + EPSILON_TOLERANCE
    spent = accounting.epsilon_of(policy.rho_cap_nano, policy.delta)
    if spent > allowed:
        raise _unsound("epsilon", f"the window would cost an epsilon of {spent:.4f}, not {policy.epsilon:g}")
    if not within({mechanism.rho_nano: rounds}, allowed, policy.delta):
        raise _unsound("epsilon", f"the window's rounds would cost slightly more than an epsilon of {policy.epsilon:g}")


def _check_time(plan: pb.RoundPlan) -> None:
    try:
        start, end = plan.start_time.ToDatetime(dt.UTC), plan.end_time.ToDatetime(dt.UTC)
        window = window_name(end, plan.policy.window_days)
    except (ValueError, OverflowError):
        raise _unsound("time", "the plan's times are none") from None
    if start >= end:
        raise _unsound("time", "the plan ends before it starts")
    if plan.window != window:
        raise _unsound("window", "the plan does not end in the window that it names")


def runs_student(asked: pb.RoundPlan | round_pb2.OpenRoundRequest) -> bool:
    """Whether devices run the student for each of their users to answer, which takes minutes and not moments."""
    return asked.HasField("adapter") or asked.measure == pb.RoundPlan.MEASURE_STUDENT


def check_plan(plan: pb.RoundPlan) -> None:
    """Refuses a plan whose numbers do not give what they claim.

    Raises:
        EbbflowError: PLAN_INVALID, with one word in `metadata["why"]`; INVALID_REQUEST if a name is malformed.
    """
    _check_shape(plan)
    _check_policy(plan)
    _check_time(plan)
    _check_mechanism(plan)
