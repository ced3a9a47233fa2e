"""Calibrated noise keeps its promise, by two accountants and, where there is one, by the exact formula."""

from typing import Any

import private_world
import pytest

from ebbflow.cloud.distillation import private_accounting
from ebbflow.cloud.distillation.private_accounting import calibrate, pld_epsilon
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import accounting


def _recipe(**changes: Any) -> Any:
    return private_world.recipe(**{"delta": 1e-6, "batch_size": 64, "corpus_size": 4096, "steps": 100, **changes})


@pytest.mark.parametrize(
    "changes",
    [{"epsilon": 2.0}, {"epsilon": 8.0, "batch_size": 512}, {"epsilon": 1.0, "batch_size": 4096, "steps": 5}],
)
def test_the_least_noise_within_epsilon_is_found(changes: dict[str, Any]) -> None:
    recipe = _recipe(**changes)
    account = calibrate(recipe)
    assert 0.97 * recipe.epsilon < account.pld_epsilon <= recipe.epsilon
    assert account.prv_epsilon == pytest.approx(account.pld_epsilon, abs=0.03)
    assert pld_epsilon(recipe, account.noise_multiplier * 0.98) > recipe.epsilon


def test_a_run_that_goes_on_elsewhere_adds_the_same_noise() -> None:
    recipe = _recipe(epsilon=1.0, batch_size=4096, steps=5)
    assert calibrate(recipe) == calibrate(recipe)


@pytest.mark.parametrize(("noise", "steps"), [(4.2, 1), (8.45, 4), (20.0, 30)])
def test_without_sampling_it_is_the_gaussian_mechanism(noise: float, steps: int) -> None:
    recipe = _recipe(batch_size=4096, steps=steps)
    exact = accounting.gaussian_epsilon(steps / (2 * noise**2), recipe.delta)
    assert pld_epsilon(recipe, noise) == pytest.approx(exact, rel=1e-3)
    assert private_accounting.prv_epsilon(recipe, noise) == pytest.approx(exact, abs=0.02)


def test_sampling_fewer_texts_costs_less_and_more_steps_cost_more() -> None:
    costs = [pld_epsilon(_recipe(batch_size=size), 1.0) for size in (16, 64, 256)]
    assert costs == sorted(costs)
    assert pld_epsilon(_recipe(steps=200), 1.0) > costs[1]


def test_a_coarser_grid_never_claims_less() -> None:
    costs = [pld_epsilon(_recipe(), 1.0, interval) for interval in (1e-4, 1e-3, 1e-2)]
    assert costs == sorted(costs)


def test_what_no_noise_can_keep_is_refused() -> None:
    with pytest.raises(EbbflowError) as caught:
        calibrate(_recipe(epsilon=0.05, batch_size=4096, steps=100_000, delta=1e-15))
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_accountants_that_disagree_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_accounting, "prv_epsilon", lambda recipe, noise: 3.0)
    with pytest.raises(EbbflowError, match="accountants"):
        calibrate(_recipe(epsilon=2.0, batch_size=4096, steps=5))
