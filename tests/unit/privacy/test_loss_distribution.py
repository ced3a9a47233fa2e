"""Three laws of the same charges, and which of them is told."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import accounting, loss_distribution
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.privacy.composition import mixture_delta
from ebbflow.common.privacy.loss_distribution import Epsilons, epsilons

DELTA = 1e-6


def discrete_epsilon(variance: Fraction, rounds: int, delta: float) -> float:
    def delta_at(epsilon: float) -> float:
        return mixture_delta(float(variance), rounds, 0.0, epsilon, 12.0)

    return accounting.smallest_epsilon(delta_at, delta, 500.0)


@pytest.mark.parametrize("rounds", [1, 2, 4, 48])
@pytest.mark.parametrize("epsilon", [0.05, 1.0, 4.0, 8.0, 64.0])
def test_the_loss_distribution_is_the_exact_figure_rounded_up(epsilon: float, rounds: int) -> None:
    mechanism = calibrate(epsilon, DELTA, 4)
    exact = discrete_epsilon(variance_of(mechanism), rounds, DELTA)
    told = epsilons([mechanism.rho_nano] * rounds, DELTA).loss_distribution
    assert exact * (1 - 1e-9) <= told <= exact * (1 + 2e-4)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_a_full_window_is_told_as_what_its_policy_promises(epsilon: float) -> None:
    told = epsilons([calibrate(epsilon, DELTA, 4).rho_nano] * 4, DELTA)
    assert told.quoted == pytest.approx(epsilon, rel=1e-3)
    assert f"{told.quoted:.3g}" == f"{epsilon:.3g}"
    assert told.quoted < told.zcdp


def test_twelve_windows_of_four_are_seventeen() -> None:
    told = epsilons([calibrate(4.0, DELTA, 4).rho_nano] * 48, DELTA)
    assert round(told.quoted, 1) == 17.4
    assert round(told.zcdp, 1) == 18.4


def test_discrete_noise_of_small_variance_is_told_as_more_than_continuous_noise() -> None:
    told = epsilons([accounting.rho_nano(Fraction(1, 4), 1)] * 4, DELTA)
    assert told.quoted == told.loss_distribution > told.gaussian * 1.01


def test_nothing_spent_is_nothing_told() -> None:
    assert epsilons([], DELTA) == Epsilons(0.0, 0.0, 0.0)


@given(st.lists(st.integers(100_000, 500_000_000), min_size=1, max_size=3), st.integers(1, 10**9))
@settings(deadline=None, max_examples=5)
def test_another_charge_never_lowers_a_figure_and_order_never_matters(charges: list[int], more: int) -> None:
    before, after = epsilons(charges, DELTA), epsilons([*charges, more], DELTA)
    assert epsilons(charges[::-1], DELTA) == before
    assert after.quoted >= before.quoted * (1 - 1e-3)
    assert after.zcdp >= before.zcdp
    assert before.quoted <= before.zcdp * (1 + 1e-3) + 1e-6


@pytest.mark.parametrize("caps", [(1,), (2,), (5,), (1, 1), (2, 3), (1, 10), (1,) * 8])
@pytest.mark.parametrize("epsilon", [4.0, 8.0])
def test_a_user_with_counters_loses_no_more_than_a_lone_vote(caps: tuple[int, ...], epsilon: float) -> None:
    """What the figure of a lone vote is told for: the exact loss of (1, caps) under noise of the larger sensitivity."""
    mechanism = calibrate(epsilon, DELTA, 4, 1 + sum(cap * cap for cap in caps))
    sigma = math.sqrt(variance_of(mechanism))
    step = 1 / sigma / 2000
    cells = [
        pld.from_discrete_gaussian_mechanism(sigma, value_discretization_interval=step, sensitivity=shift)
        for shift in (1, *caps)
    ]
    one, *others = cells
    for other in others:
        one = one.compose(other)
    exact = one.self_compose(4).get_epsilon_for_delta(DELTA)
    assert exact <= epsilons([mechanism.rho_nano] * 4, DELTA).quoted * (1 + 1e-3)


@pytest.mark.parametrize(("scale", "spread"), [(16, False), (48, False), (16, True)])
def test_a_user_of_an_adapter_round_loses_no_more_than_a_lone_vote(scale: int, spread: bool) -> None:
    """A change of one value by the whole scale, and one of scale² values by one each: the two ends of the sphere."""
    mechanism = calibrate(4.0, DELTA, 4, scale * scale)
    sigma, step = math.sqrt(variance_of(mechanism)), 1 / 2.388 / 2000
    shift, cells = (1, scale * scale) if spread else (scale, 1)
    if spread:
        step /= scale  # a cell alone says so little that a coarse grid would round most of it up
    one = pld.from_discrete_gaussian_mechanism(sigma, value_discretization_interval=step, sensitivity=shift)
    exact = one.self_compose(4 * cells).get_epsilon_for_delta(DELTA)
    assert 0.98 * 4.0 < exact <= epsilons([mechanism.rho_nano] * 4, DELTA).quoted * (1 + 2e-3)


@pytest.mark.parametrize(("charges", "delta"), [([0], DELTA), ([-1], DELTA), ([1], 0.0), ([1], 1.0)])
def test_what_makes_no_sense_is_refused(charges: list[int], delta: float) -> None:
    with pytest.raises(ValueError, match="charge"):
        epsilons(charges, delta)


def test_without_dp_accounting_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    loss_distribution._epsilons.cache_clear()
    with pytest.raises(EbbflowError, match="pip install") as caught:
        epsilons([12345], DELTA)
    assert caught.value.reason is Reason.EXTRA_MISSING


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    program = (
        "import sys, ebbflow.common.privacy.loss_distribution, ebbflow.common.privacy.audit.examine;"
        "print([name for name in ('scipy', 'dp_accounting', 'torch') if name in sys.modules])"
    )
    path = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]"


def test_all_orders_of_mixed_charges_are_one_figure() -> None:
    charges = [accounting.rho_nano(Fraction(variance), 1) for variance in (2, 6, 40)]
    assert len({epsilons(order, DELTA) for order in itertools.permutations(charges)}) == 1
