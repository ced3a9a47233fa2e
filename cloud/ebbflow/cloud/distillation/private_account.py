"""What several runs of private training on the same texts cost each text together.

Runs add up whether or not one is built on another, and in whatever order they were chosen: privacy loss distributions
compose adaptively. A file is known by its hash alone, so one that differs by a line has an account of its own.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1.distillation_pb2 import PrivateTraining
from ebbflow.cloud.distillation.private_recipe import DEFAULT_DELTA
from ebbflow.cloud.registry.tables import Distillation, DistillationState, Json

_GRID = 1e-3  # on which losses are laid; a finer one takes ten times as long and claims a thousandth less
_COUNTED = (DistillationState.QUEUED, DistillationState.RUNNING, DistillationState.SUCCEEDED)
"""In these states a run counts; in others only if it had begun, which the noise that its worker wrote down shows."""


@dataclass(frozen=True)
class Total:
    """What a text pays that was in all of it."""

    epsilon: float = 0.0
    delta: float = 0.0


@dataclass(frozen=True)
class Run:
    """One run of private training."""

    name: str
    """Identifier of its distillation."""
    training: PrivateTraining


def read(kept: Json) -> PrivateTraining:
    """Reads column `private_training`, also of an older or newer version."""
    return json_format.ParseDict(kept, PrivateTraining(), ignore_unknown_fields=True)


def runs_on(session: Session, sha256: str) -> list[Run]:
    """Returns the runs on one file that have cost something or will, oldest first; none without a file."""
    if not sha256:
        return []
    query = (
        sa.select(Distillation.id, Distillation.state, Distillation.private_training)
        .where(Distillation.private_corpus_sha256 == sha256)
        .order_by(Distillation.create_time, Distillation.id)
    )
    found = [(state, Run(id_, read(kept))) for id_, state, kept in session.execute(query)]
    return [run for state, run in found if state in _COUNTED or run.training.noise_multiplier]


def together(trainings: Iterable[PrivateTraining]) -> Total:
    """Adds runs up.

    Runs whose noise is known are composed by their privacy loss distributions, at the smallest of their deltas, so that
    another run always adds to epsilon. The others, which no worker has begun, are added as they were ordered.
    """
    runs = list(trainings)
    total = _total([run for run in runs if run.noise_multiplier])
    ordered = [run for run in runs if not run.noise_multiplier]
    epsilon = total.epsilon + sum(run.epsilon for run in ordered)
    return Total(epsilon, total.delta + sum(_delta(run) for run in ordered))


def _total(known: list[PrivateTraining]) -> Total:
    """Composes runs whose noise is known."""
    if not known:
        return Total()
    if len(known) == 1:
        return Total(known[0].pld_epsilon, _delta(known[0]))
    steps: Counter[tuple[float, float]] = Counter()
    for run in known:
        steps[run.noise_multiplier, run.batch_size / run.corpus_size] += run.steps
    delta = min(_delta(run) for run in known)
    epsilon = _composed(tuple(sorted(steps.items())), delta)
    if math.isfinite(epsilon):
        return Total(epsilon, delta)
    # A delta that is lost in the distributions' own tails; the sum of what was claimed holds too.
    return Total(sum(run.pld_epsilon for run in known), sum(_delta(run) for run in known))


def _delta(run: PrivateTraining) -> float:
    return run.delta or DEFAULT_DELTA


@functools.lru_cache(maxsize=256)
def _composed(steps: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    """Returns the epsilon of so many steps at each noise multiplier and sampling rate: an upper bound."""
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant(value_discretization_interval=_GRID)
    for (noise, rate), count in steps:
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, count))
    return float(accountant.get_epsilon(delta))
