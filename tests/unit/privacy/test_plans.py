"""A plan whose numbers do not give what they claim is turned down, with the reason in a word."""

import time
from collections.abc import Callable

import adapter_world
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from list_costs import cost_nano

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.plans import check_plan


def test_the_cloud_makes_sound_plans(plan: pb.RoundPlan) -> None:
    check_plan(plan)
    assert plan.mechanism.sensitivity_squared == 1 + 2**2
    assert plan.mechanism.rho_nano * plan.policy.rounds_per_window == plan.policy.rho_cap_nano


def halve_sigma(plan: pb.RoundPlan) -> None:
    plan.mechanism.sigma_squared_denominator *= 4


def restate_cost(plan: pb.RoundPlan) -> None:
    variance = variance_of(plan.mechanism)
    plan.mechanism.rho_nano = cost_nano(variance, plan.mechanism.sensitivity_squared)


def halve_sigma_and_restate_the_cost(plan: pb.RoundPlan) -> None:
    halve_sigma(plan)
    restate_cost(plan)


def halve_sigma_and_restate_the_cap(plan: pb.RoundPlan) -> None:
    halve_sigma_and_restate_the_cost(plan)
    plan.policy.rho_cap_nano = 4 * plan.mechanism.rho_nano


BROKEN: dict[str, tuple[Callable[[pb.RoundPlan], object], str]] = {
    "half the noise": (halve_sigma, "rho"),
    "half the noise, cost restated": (halve_sigma_and_restate_the_cost, "rho_cap"),
    "half the noise, cost and cap restated": (halve_sigma_and_restate_the_cap, "epsilon"),
    "sensitivity understated": (lambda plan: setattr(plan.metrics[0], "cap", 3), "sensitivity"),
    "no end": (lambda plan: plan.ClearField("end_time"), "time"),
    "no mechanism": (lambda plan: plan.ClearField("mechanism"), "mechanism"),
    "variance undefined": (lambda plan: setattr(plan.mechanism, "sigma_squared_denominator", 0), "mechanism"),
    "variance too large": (lambda plan: setattr(plan.mechanism, "sigma_squared_numerator", 2**63), "mechanism"),
    "same bin twice": (lambda plan: setattr(plan.bins[1], "bin_id", plan.bins[0].bin_id), "bins"),
    "too many bins": (lambda plan: plan.bins.extend([pb.Bin(bin_id=str(i), texts=["x"]) for i in range(254)]), "bins"),
    "no bins": (lambda plan: plan.ClearField("bins"), "bins"),
    "a bin without a text": (lambda plan: plan.bins[0].ClearField("texts"), "texts"),
    "too few null bins": (lambda plan: setattr(plan, "null_bins", 63), "null_bins"),
    "a window made up": (lambda plan: setattr(plan, "window", "2026-11-02"), "window"),
    "no users": (lambda plan: setattr(plan, "max_users", 0), "max_users"),
    "a metric without a cap": (lambda plan: setattr(plan.metrics[0], "cap", 0), "metrics"),
    "epsilon is no number": (lambda plan: setattr(plan.policy, "epsilon", float("nan")), "policy"),
    "epsilon is infinite": (lambda plan: setattr(plan.policy, "epsilon", float("inf")), "policy"),
    "epsilon understated": (lambda plan: setattr(plan.policy, "epsilon", 3.9), "epsilon"),
    "delta understated": (lambda plan: setattr(plan.policy, "delta", 1e-7), "epsilon"),
    "more rounds than the cap": (lambda plan: setattr(plan.policy, "rounds_per_window", 5), "rho_cap"),
    "too many null bins": (lambda plan: setattr(plan, "null_bins", 1025), "null_bins"),
    "a measure that nobody knows": (lambda plan: setattr(plan, "measure", 7), "measure"),
    "nearness without a limit": (lambda plan: plan.metrics.add(kind=pb.Metric.KIND_NEAR, cap=1), "near"),
    "nearness counted twice": (lambda plan: plan.metrics.add(kind=pb.Metric.KIND_NEAR, cap=2), "metrics"),
    "a metric that nobody knows": (lambda plan: plan.metrics.add(kind=9, cap=1), "metrics"),
    "kept for ever": (lambda plan: setattr(plan.policy, "retention_days", 10**6), "policy"),
    "an adapter beside the votes": (lambda plan: plan.adapter.MergeFrom(pb.AdapterPlan(release=1)), "bins"),
    "a cap beyond epsilon": (lambda plan: setattr(plan.policy, "rho_cap_nano", 500_000_000), "epsilon"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plan_is_refused(plan: pb.RoundPlan, name: str) -> None:
    break_, why = BROKEN[name]
    break_(plan)
    with pytest.raises(EbbflowError) as caught:
        check_plan(plan)
    assert caught.value.reason is Reason.PLAN_INVALID
    assert caught.value.metadata["why"] == why


def test_the_message_tells_the_true_epsilon(plan: pb.RoundPlan) -> None:
    halve_sigma_and_restate_the_cap(plan)
    with pytest.raises(EbbflowError, match=r"an epsilon of 9\.18\d+, not 4"):
        check_plan(plan)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(0, 0, 10**15, 0)
@example(-(10**15), 0, 0, 0)
@example(0, -1, 0, 2**31 - 1)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(2**63), 2**63 - 1) | st.integers(-(10**11), 3 * 10**11),
    st.integers(-(2**31), 2**31 - 1),
)
def test_times_that_are_none_are_refused(
    plan: pb.RoundPlan, start_s: int, start_nanos: int, end_s: int, end_nanos: int
) -> None:
    odd = pb.RoundPlan.FromString(plan.SerializeToString())
    odd.start_time.seconds, odd.start_time.nanos = start_s, start_nanos
    odd.end_time.seconds, odd.end_time.nanos = end_s, end_nanos
    with pytest.raises(EbbflowError) as caught:
        check_plan(odd)
    assert caught.value.metadata["why"] in {"time", "window"}


def test_a_plan_that_would_be_dear_to_check_is_refused_at_once(plan: pb.RoundPlan) -> None:
    """A thousand rounds of noise so small that its lattice shows."""
    plan.ClearField("metrics")
    mechanism = pb.Mechanism(kind=plan.mechanism.kind, sensitivity_squared=1)
    mechanism.sigma_squared_numerator, mechanism.sigma_squared_denominator = 39, 10
    mechanism.rho_nano = cost_nano(variance_of(mechanism), 1)
    plan.mechanism.CopyFrom(mechanism)
    plan.policy.rounds_per_window, plan.policy.rho_cap_nano = 1000, 2**63
    for epsilon in (4.0, 64.0, 1e300):
        plan.policy.epsilon = epsilon
        begin = time.process_time()
        with pytest.raises(EbbflowError):
            check_plan(plan)
        assert time.process_time() - begin < 0.5


def test_names_are_checked(plan: pb.RoundPlan) -> None:
    plan.round = "somewhere/else"
    with pytest.raises(EbbflowError) as caught:
        check_plan(plan)
    assert caught.value.reason is Reason.INVALID_REQUEST


@pytest.fixture
def adapter_round() -> pb.RoundPlan:
    return adapter_world.round_plan(adapter_world.adapter_plan(adapter_world.config()))


def test_a_round_of_adapter_updates_is_sound_too(adapter_round: pb.RoundPlan) -> None:
    check_plan(adapter_round)
    assert (
        adapter_round.mechanism.rho_nano * adapter_round.policy.rounds_per_window <= adapter_round.policy.rho_cap_nano
    )


def understate_scale(plan: pb.RoundPlan) -> None:
    plan.adapter.scale = plan.adapter.scale * 5 // 4


def restate_sensitivity(plan: pb.RoundPlan) -> None:
    """A clip a quarter larger under the same noise, and a cost that admits it."""
    understate_scale(plan)
    plan.mechanism.sensitivity_squared = plan.adapter.scale**2
    restate_cost(plan)


BROKEN_ADAPTERS: dict[str, tuple[Callable[[pb.RoundPlan], object], str]] = {
    "not allowed by the policy": (lambda plan: setattr(plan.policy, "allow_adapters", False), "adapters"),
    "sensitivity understated": (understate_scale, "sensitivity"),
    "a cost beyond the cap": (restate_sensitivity, "rho_cap"),
    "half the noise": (halve_sigma, "rho"),
    "bins too": (lambda plan: plan.bins.add(bin_id="a", texts=["b"]), "bins"),
    "metrics too": (lambda plan: plan.metrics.add(kind=pb.Metric.KIND_FAILED, cap=1), "bins"),
    "too few null bins": (lambda plan: setattr(plan, "null_bins", 64), "null_bins"),
    "no values": (lambda plan: setattr(plan.adapter, "dimension", 0), "dimension"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_plan_of_adapters_is_refused(adapter_round: pb.RoundPlan, name: str) -> None:
    break_, why = BROKEN_ADAPTERS[name]
    break_(adapter_round)
    with pytest.raises(EbbflowError) as caught:
        check_plan(adapter_round)
    assert (caught.value.reason, caught.value.metadata["why"]) == (Reason.PLAN_INVALID, why)
