"""How sure a student is of its own answer, as a share of tokens that can be expected to be right. No IO.

Most tokens of most answers are easy, whatever was asked, so an answer is judged by its least sure tenth (quantiles of
token probabilities tell hard questions better than their mean: Gupta et al. 2024, "Language model cascades").

A token's probability says how sure the student is, but students are too sure or not sure enough. Platt's scaling (Platt
1999, "Probabilistic outputs for support vector machines") straightens that: a logistic curve over the log-odds of the
likeliest token, fitted to texts that the student has not learnt from and whose next tokens are known.

Shapes: T positions, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.edge.engine.base import Logits

Doubles = npt.NDArray[np.float64]

LEAST_SURE = 0.1
"""Share of an answer's tokens that it is judged by."""
_MOST_LOG_ODDS = 30.0
_PRIOR = 1.0  # precision of the belief that probabilities mean what they say: as much as about four tokens
_STEPS = 50
_CLOSE = 1e-9


@dataclass(frozen=True)
class Calibration:
    """A curve from the probability that a student gives a token to the probability that the token is right."""

    slope: float = 1.0
    """Below 1: the student is too sure. Never negative."""
    offset: float = 0.0
    tokens: int = 0
    """How many it was fitted to; 0 takes the student at its word."""

    def right(self, log_probs: Sequence[float] | Doubles) -> Doubles:
        """Returns how likely each token is right, from the natural logarithms of their probabilities."""
        return _sigmoid(self.slope * _log_odds(log_probs) + self.offset)

    def confidence(self, log_probs: Sequence[float]) -> float:
        """Returns how many of the least sure tenth of an answer's tokens are right, as an expected share.

        0 for an answer without tokens.
        """
        if not len(log_probs):
            return 0.0
        rising = np.sort(self.right(log_probs))
        return float(rising[: math.ceil(len(rising) * LEAST_SURE)].mean())


@dataclass(frozen=True)
class Observation:
    """What a student said of known tokens."""

    log_probs: Doubles
    """Of the likeliest token at each place."""
    hits: npt.NDArray[np.bool_]
    """Whether that is the token which stands there."""


def fit(observations: Sequence[Observation]) -> Calibration:
    """Fits the curve: the likeliest one, given a belief in the student's own probabilities that data soon outweigh."""
    if not observations:
        return Calibration()
    odds_T = np.concatenate([_log_odds(each.log_probs) for each in observations])
    hits_T = np.concatenate([each.hits for each in observations]).astype(np.float64)
    slope, offset = _newton(odds_T, hits_T)
    if slope < 0:  # less sure where it is right: its probabilities tell nothing
        slope, offset = 0.0, _newton(np.zeros_like(odds_T), hits_T)[1]
    return Calibration(slope, offset, len(odds_T))


def observe(logits_TV: Logits, targets_T: npt.NDArray[np.int64]) -> Observation:
    """Compares what is likeliest with what stands there."""
    best_T = logits_TV.argmax(axis=1)
    most_T = logits_TV[np.arange(len(best_T)), best_T].astype(np.float64)
    log_probs_T = -np.log(np.exp(logits_TV - most_T[:, None]).sum(axis=1, dtype=np.float64))
    return Observation(log_probs_T, best_T == targets_T)


def _log_odds(log_probs: Sequence[float] | Doubles) -> Doubles:
    logs_T = np.minimum(np.asarray(log_probs, np.float64), 0.0)
    with np.errstate(divide="ignore"):
        odds_T: Doubles = logs_T - np.log(-np.expm1(logs_T))
    return np.clip(odds_T, -_MOST_LOG_ODDS, _MOST_LOG_ODDS)


def _sigmoid(values: Doubles) -> Doubles:
    result: Doubles = 0.5 * (1.0 + np.tanh(0.5 * values))
    return result


def _newton(odds_T: Doubles, hits_T: Doubles) -> tuple[float, float]:
    """Maximises the posterior of (slope, offset), which is concave; steps are halved until they help."""
    features_T2 = np.stack([odds_T, np.ones_like(odds_T)], axis=1)
    prior_2 = np.array([1.0, 0.0])
    now_2 = prior_2.copy()
    loss = _loss(features_T2, hits_T, now_2, prior_2)
    for _ in range(_STEPS):
        right_T = _sigmoid(features_T2 @ now_2)
        gradient_2 = features_T2.T @ (right_T - hits_T) + _PRIOR * (now_2 - prior_2)
        curvature_22 = (features_T2 * (right_T * (1 - right_T))[:, None]).T @ features_T2 + _PRIOR * np.eye(2)
        step_2 = np.linalg.solve(curvature_22, gradient_2)
        while (new := _loss(features_T2, hits_T, now_2 - step_2, prior_2)) > loss and np.abs(step_2).max() > _CLOSE:
            step_2 = step_2 / 2
        if np.abs(step_2).max() <= _CLOSE:
            break
        now_2, loss = now_2 - step_2, new
    return float(now_2[0]), float(now_2[1])


def _loss(features_T2: Doubles, hits_T: Doubles, at_2: Doubles, prior_2: Doubles) -> float:
    values_T = features_T2 @ at_2
    nats = np.logaddexp(0.0, values_T).sum() - (hits_T * values_T).sum()
    return float(nats + _PRIOR / 2 * ((at_2 - prior_2) ** 2).sum())
