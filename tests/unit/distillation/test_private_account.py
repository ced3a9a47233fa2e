"""What several runs on the same private texts cost together."""

import functools
from typing import Any

import pytest
from opacus.accountants import PRVAccountant

from ebbflow.api.v1.distillation_pb2 import PrivateTraining
from ebbflow.cloud.distillation.private_account import Total, read, together
from ebbflow.cloud.distillation.private_accounting import pld_epsilon
from ebbflow.cloud.distillation.private_recipe import PrivateRecipe

RUN = {"steps": 300, "batch_size": 256, "corpus_size": 5000}


def recipe(**changes: Any) -> PrivateRecipe:
    others = {"epsilon": 8.0, "delta": 1e-6, "learning_rate": 0.1, "sequence_length": 8}
    return PrivateRecipe(**{**others, **RUN, **changes})


@functools.lru_cache
def done(noise: float, delta: float = 1e-6) -> PrivateTraining:
    """A run as its worker wrote it down."""
    epsilon = pld_epsilon(recipe(delta=delta), noise, interval=1e-3)
    return PrivateTraining(epsilon=99.0, delta=delta, noise_multiplier=noise, pld_epsilon=epsilon, **RUN)


def test_no_run_costs_nothing() -> None:
    assert together([]) == Total(0.0, 0.0)


def test_one_run_costs_what_its_worker_wrote_down() -> None:
    run = done(1.35)
    assert together([run]) == Total(run.pld_epsilon, 1e-6)


def test_two_halves_of_a_run_cost_what_the_whole_does() -> None:
    total = together([done(1.35), done(1.35)])
    assert total.delta == 1e-6
    assert total.epsilon == pytest.approx(pld_epsilon(recipe(steps=600), 1.35), rel=1e-3)
    assert total.epsilon < 1.6 * done(1.35).pld_epsilon


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow in the far tails, which Opacus cuts off
def test_runs_of_two_kinds_cost_what_another_accountant_says() -> None:
    accountant = PRVAccountant()
    rate = RUN["batch_size"] / RUN["corpus_size"]
    accountant.history = [(1.35, rate, 300), (2.0, rate, 300)]
    theirs = accountant.get_epsilon(1e-6, eps_error=0.01)
    assert together([done(1.35), done(2.0)]).epsilon == pytest.approx(theirs, abs=0.02)


def test_a_run_that_has_not_begun_counts_as_it_was_ordered() -> None:
    ordered = PrivateTraining(epsilon=4.0, **RUN)
    assert together([ordered]) == Total(4.0, 1e-6), "the usual delta"
    assert together([ordered, done(1.35)]) == Total(4.0 + done(1.35).pld_epsilon, 2e-6)


def test_another_run_always_costs_more_whatever_its_delta_and_place() -> None:
    runs: list[PrivateTraining] = []
    last = 0.0
    for run in (done(0.8), done(10.0), done(3.0, delta=1e-9), done(3.0, delta=1e-5), done(10.0)):
        runs.append(run)
        total = together(runs)
        assert total == together(reversed(runs))
        assert total.epsilon > last
        last = total.epsilon
    assert total.delta == 1e-9


def test_a_delta_beyond_what_distributions_hold_falls_back_on_the_sum() -> None:
    tiny = PrivateTraining(delta=1e-15, noise_multiplier=0.8, pld_epsilon=40.0, **RUN)
    total = together([tiny] * 3)
    assert total.epsilon == 120.0
    assert total.delta == pytest.approx(3e-15)


def test_what_a_newer_version_wrote_is_read() -> None:
    assert read({"epsilon": 4.0, "ofTomorrow": 1}).epsilon == 4.0
