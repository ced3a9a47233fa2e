"""Whatever mixture of rounds is admitted, its epsilon is no more than what was promised."""

import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from list_costs import cost_nano
from scipy.special import log_ndtr, ndtri_exp

from ebbflow.common.privacy import accounting
from ebbflow.common.privacy.calibration import calibrate, variance_of
from ebbflow.common.privacy.composition import covers, mixture_delta, variance_for, within
from ebbflow.common.privacy.gaussian import probabilities

DELTA = 1e-6
POLICIES = [(1.0, 4), (2.0, 1), (4.0, 1), (4.0, 4), (4.0, 12), (8.0, 1), (8.0, 4), (16.0, 4), (64.0, 1)]


def loss_of(variance: float, shift: int, interval: float = 5e-4) -> pld.PrivacyLossDistribution:
    """Rounded down, so that its epsilon is no more than the true one."""
    return pld.from_discrete_gaussian_mechanism(
        math.sqrt(variance), shift, value_discretization_interval=interval, pessimistic_estimate=False
    )


@pytest.mark.parametrize("variance", [1 / 3, 0.4, 1.0, 1.42, 5.7, 11.6, 30.0, 71.4, 1000.0])
def test_discrete_noise_is_continuous_noise_of_a_variance_less_a_twelfth_that_was_rounded(variance: float) -> None:
    """On the scale of a standard normal no step of the distribution is longer than the bound, to 37 sigma."""
    rate = 6 * (1 - math.sqrt(1 - 1 / (3 * variance)))
    assert rate - rate**2 / 12 == pytest.approx(1 / variance)
    most = math.ceil(60 * math.sqrt(variance))
    logs = -(np.arange(-most, most + 1) ** 2.0) / (2 * variance)
    tails = np.logaddexp.accumulate(logs[::-1])[::-1]
    beyond = math.ceil(37 * math.sqrt(variance))
    steps = np.diff(-ndtri_exp(tails[most : most + beyond] - tails[0]))  # those below zero are the same
    assert steps.max() <= math.sqrt(rate) * (1 + 1e-9)
    assert 2 * -ndtri_exp(tails[most + 1] - tails[0]) <= math.sqrt(rate) * (1 + 1e-9)
    assert steps.max() > math.sqrt(rate) * 0.98 or variance < 1


@given(st.integers(1, 10**11), st.integers(2, 10**6))
def test_a_list_gets_the_least_noise_that_its_cost_covers(cost: int, sensitivity: int) -> None:
    variance = variance_for(cost, sensitivity)
    assert covers(cost, variance, sensitivity)
    assert not covers(cost, variance * Fraction(10**9 - 1, 10**9), sensitivity)
    assert not covers(cost - 1, variance, sensitivity) if cost > 1 else True
    assert variance > Fraction(sensitivity * accounting.NANO, 2 * cost)
    assert cost_nano(variance, sensitivity) == cost


@pytest.mark.parametrize("shift", [(1,) * 64, (16,), (9, 9, 9, 3, 2), (1, 10), (1, 400)])
@pytest.mark.parametrize(("epsilon", "rounds"), [(4.0, 4), (8.0, 1)])
def test_a_list_is_within_its_claim_however_a_change_is_spread(
    shift: tuple[int, ...], epsilon: float, rounds: int
) -> None:
    """Adapter updates among them: both ends of the sphere, and what lies between."""
    variance = float(variance_of(calibrate(epsilon, DELTA, rounds, sum(part * part for part in shift))))
    total = None
    for part, times in Counter(shift).items():
        one = loss_of(variance, part, 2e-4 / math.sqrt(len(shift))).self_compose(times * rounds)
        total = one if total is None else total.compose(one)
    assert total is not None
    assert total.get_epsilon_for_delta(DELTA) <= epsilon


@pytest.mark.parametrize(("epsilon", "rounds"), POLICIES)
def test_every_round_of_a_policy_is_admitted_and_no_other(epsilon: float, rounds: int) -> None:
    cost = calibrate(epsilon, DELTA, rounds).rho_nano
    assert all(within({cost: times}, epsilon, DELTA) for times in range(1, rounds + 1))
    assert within([cost] * rounds, epsilon, DELTA)
    assert not within({cost: rounds + 1}, epsilon, DELTA)
    assert within({}, epsilon, DELTA)


@pytest.mark.parametrize(("epsilon", "rounds"), [(4.0, 4), (16.0, 2), (5.0, 4)])
@pytest.mark.parametrize("cap", [1, 3])
def test_votes_and_lists_of_one_policy_share_its_window(epsilon: float, rounds: int, cap: int) -> None:
    vote, richer = (float(variance_of(calibrate(epsilon, DELTA, rounds, each))) for each in (1, 1 + cap * cap))
    for votes in range(rounds):
        lists = rounds - votes
        total = loss_of(richer, 1).compose(loss_of(richer, cap)).self_compose(lists)
        if votes:
            total = total.compose(loss_of(vote, 1).self_compose(votes))
        assert total.get_epsilon_for_delta(DELTA) <= epsilon


@pytest.mark.parametrize(("epsilon", "rounds", "truth"), [(4.0, 4, 4.0005), (8.0, 1, 8.13), (8.0, 4, 8.015)])
def test_cheap_rounds_do_not_fill_what_a_full_window_leaves_of_rho(epsilon: float, rounds: int, truth: float) -> None:
    mechanism = calibrate(epsilon, DELTA, rounds)
    cap, cost = accounting.rho_nano_cap(epsilon, DELTA), mechanism.rho_nano
    left = cap - rounds * cost
    cheap = left // 10
    assert not within({cost: rounds, cheap: 10}, epsilon, DELTA)
    assert not within({cost: rounds, left: 1}, epsilon, DELTA)
    variance = float(variance_of(mechanism))
    assert mixture_delta(variance, rounds, left / accounting.NANO, truth, 12.0) > DELTA


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([1.0, 4.0, 8.0]),
    st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]), st.integers(1, 4)), min_size=2, max_size=12),
)
def test_whatever_mixture_is_admitted_is_within_epsilon(epsilon: float, asked: list[tuple[float, int]]) -> None:
    """As a device does: each round is charged if it fits, and left out otherwise."""
    charged: Counter[int] = Counter()
    for claim, rounds in asked:
        cost = calibrate(claim, DELTA, rounds).rho_nano
        if within(charged + Counter([cost]), epsilon, DELTA):
            charged[cost] += 1
    if not charged:
        return
    total = None
    for cost, times in charged.items():
        one = loss_of(accounting.NANO / (2 * cost), 1, 1e-3).self_compose(times)
        total = one if total is None else total.compose(one)
    assert total is not None
    assert total.get_epsilon_for_delta(DELTA) <= epsilon


def most_to_gain(epsilon: float, rounds: int) -> float:
    """Delta of whoever chooses after each answer what the next round asks for: a vote, a list, or all that is left.

    Worked out from the last round backwards, over a grid of the loss so far.
    """
    mechanism = calibrate(epsilon, DELTA, rounds)
    variance, fine = float(variance_of(mechanism)), 16
    step = 1 / variance / fine
    loss = np.arange(-int((epsilon + 20) / step), int((epsilon + 20) / step) + 1) * step
    votes = np.array(probabilities(variance, math.ceil(9 * math.sqrt(variance)) + 1))
    rho = 1 / (2 * (variance + 1 / 12))
    width = int(9 * math.sqrt(2 * rho) / step) + 1
    bell = np.exp(-((np.arange(-width, width + 1) * step) ** 2) / (4 * rho))
    third = 2 * mechanism.rho_nano / (3 * accounting.NANO)
    dearer = 3 * third / (1 + math.sqrt(1 - third))

    def continuous(left: float) -> npt.NDArray[np.float64]:
        mu, away = math.sqrt(2 * left), epsilon - loss
        far = np.exp(np.minimum(700, away) + log_ndtr(-(away / mu + mu / 2)))
        told: npt.NDArray[np.float64] = np.exp(log_ndtr(-(away / mu - mu / 2))) - far
        return told

    worth = np.maximum(0, -np.expm1(np.minimum(0, epsilon - loss)))
    for asked in reversed(range(rounds)):
        reach = len(votes) // 2
        shifts = (np.arange(-reach, reach + 1) * fine) + fine // 2
        places = np.clip(np.arange(len(loss)) + shifts[:, None], 0, len(loss) - 1)
        vote = votes @ worth[places]
        moved = np.pad(np.interp(loss + rho, loss, worth), width, mode="edge")
        listed = np.convolve(moved, bell / bell.sum(), "valid")
        rest = continuous(max(1e-9, accounting.rho_nano_cap(epsilon, DELTA) / accounting.NANO - asked * dearer))
        worth = np.maximum.reduce([vote, listed, rest])
    return float(worth[len(worth) // 2])


@pytest.mark.parametrize(("epsilon", "rounds"), [(1.0, 2), (2.0, 4), (4.0, 2), (4.0, 4), (5.0, 4), (6.0, 2), (8.0, 4)])
def test_nothing_is_gained_by_choosing_what_a_round_asks_for_after_the_answers_before(
    epsilon: float, rounds: int
) -> None:
    assert most_to_gain(epsilon, rounds) <= DELTA * (1 + 1e-4)


@pytest.mark.parametrize("rounds", [1, 4, 30, 118, 400, 1000])
@pytest.mark.parametrize("epsilon", [0.05, 4.0, 63.9])
def test_the_dearest_question_takes_less_than_a_second(epsilon: float, rounds: int) -> None:
    cost = accounting.rho_nano_cap(epsilon, DELTA) // rounds
    begin = time.process_time()
    within({cost: rounds}, epsilon, DELTA)
    assert time.process_time() - begin < 1.0
