"""What rounds will say, before they are opened: noise, topics that stand out, and what the next student gains.

No formula knows how good the best guesses at noisy counts are, so `forecast` plays rounds: it draws users who ask by
Zipf's law, adds the noise that agents add, and makes the guesses that the cloud makes. What a student gains from a
mixture is a curve that was fitted to students which were trained (docs/explanation/what-feedback-is-worth.md compares
its words with theirs).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.calibration import DEFAULT_DELTA, DEFAULT_ROUNDS_PER_WINDOW, calibrate, variance_of
from ebbflow.common.privacy.plans import MAX_BINS
from ebbflow.common.privacy.shrinkage import shrink
from ebbflow.common.privacy.significance import SIGNIFICANT, is_informative
from ebbflow.common.privacy.weights import weights

FAILING_SHARE = 0.25
"""Share of votes that failed, as it is assumed."""
ACCURACY = 0.7
"""Share of votes that go to the right bin; the others go anywhere. Measured, on short requests."""
SATURATION = 0.5
"""How much a student knows of a topic that its mixture leaves out, in units of an even share; fitted."""
DRAWS = 20
"""Rounds that are played, at least."""
_PLAYED = 1_000  # bins that are played at least
_LEAST_GAIN = 0.01  # of unprotected feedback, below which a share of it means nothing
MOST_AGENTS = 10_000_000
MOST_USERS = 1_000_000
MOST_SKEW = 4.0

_Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """What is planned.

    Attributes:
        agents: that serve the student.
        users: of each agent with something to vote about.
        epsilon: of a whole window.
        bins: topics of the plan.
        rounds: rounds that share the window's budget.
        delta: of the window.
        skew: exponent of Zipf's law, at least 0; with 0 all topics are asked for alike and there is nothing to learn.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field that cannot be.
    """

    agents: int
    users: int
    epsilon: float
    bins: int = 10
    rounds: int = DEFAULT_ROUNDS_PER_WINDOW
    delta: float = DEFAULT_DELTA
    skew: float = 0.8

    def __post_init__(self) -> None:
        for field, most in (("agents", MOST_AGENTS), ("users", MOST_USERS), ("bins", MAX_BINS)):
            least = 2 if field == "bins" else 1
            if not least <= getattr(self, field) <= most:
                raise EbbflowError(Reason.INVALID_REQUEST, f"{field} must be {least} to {most:,}", field=field)
        if not 0 <= self.skew <= MOST_SKEW:
            raise EbbflowError(Reason.INVALID_REQUEST, f"skew must be 0 to {MOST_SKEW:g}", field="skew")


@dataclass(frozen=True)
class Forecast:
    """What to expect of one round, and of all that share a window's budget."""

    agent_noise_std: float
    """Of the noise on each count of one agent."""
    noise_std: float
    """Of the noise on each count of all agents together."""
    users_needed: int
    """Users who must agree for a count to stand three deviations above zero."""
    bins_seen: float
    """Share of the topics that do, if users ask by Zipf's law."""
    error: float
    """L1 distance of the mixture to that of the truth, 0 to 2."""
    error_without_noise: float
    """The same if nothing were protected: few users are a poor sample even so."""
    error_without_feedback: float
    """The same of an even mixture."""
    gain_share: float
    """Of what the next student gains from unprotected feedback, how much it gains from this; 0 if that is nothing."""
    window_gain_share: float
    """The same of all rounds of the window together, as the cloud adds them up."""


def forecast(question: Question) -> Forecast:
    """Plays rounds and says what came of them on average; the same question always has the same answer.

    Raises:
        EbbflowError: INVALID_REQUEST if epsilon, delta or the number of rounds is out of range.
    """
    mechanism = calibrate(question.epsilon, question.delta, question.rounds)
    agent_noise_std = math.sqrt(variance_of(mechanism))
    noise_std = agent_noise_std * math.sqrt(question.agents)
    demand_K = np.arange(1.0, question.bins + 1) ** -question.skew
    demand_K /= demand_K.sum()
    even_K = np.full(question.bins, 1 / question.bins)
    true_K = _mixture(demand_K.tolist(), [0.0] * question.bins, 0.0)
    votes_K = ACCURACY * demand_K + (1 - ACCURACY) * even_K
    users = question.agents * question.users
    noisy_DK, clear_DK, seen_DK = _play_many(votes_K, users, noise_std)
    window_DK, window_clear_DK, _ = _play_many(votes_K, users * question.rounds, noise_std * math.sqrt(question.rounds))
    return Forecast(
        agent_noise_std=agent_noise_std,
        noise_std=noise_std,
        users_needed=math.ceil(SIGNIFICANT * noise_std),
        bins_seen=float(seen_DK.mean()),
        error=float(np.abs(noisy_DK - true_K).sum(axis=1).mean()),
        error_without_noise=float(np.abs(clear_DK - true_K).sum(axis=1).mean()),
        error_without_feedback=float(np.abs(even_K - true_K).sum()),
        gain_share=_gain_share(noisy_DK, clear_DK, demand_K),
        window_gain_share=_gain_share(window_DK, window_clear_DK, demand_K),
    )


def gain(mixture_K: _Shares, demand_K: _Shares) -> float:
    """What a student gains by a mixture over an even one, in units of its own: the curve that was fitted.

    What it learns of a topic grows with the logarithm of the texts that it has read of it.
    """
    exposure_K = mixture_K * len(mixture_K)
    return float(demand_K @ np.log((exposure_K + SATURATION) / (1 + SATURATION)))


def _gain_share(noisy_DK: _Shares, clear_DK: _Shares, demand_K: _Shares) -> float:
    noisy, clear = (np.mean([gain(row_K, demand_K) for row_K in rows_DK]) for rows_DK in (noisy_DK, clear_DK))
    return float(noisy / clear) if clear > _LEAST_GAIN else 0.0


def _play_many(shares_K: _Shares, users: int, noise_std: float) -> tuple[_Shares, _Shares, npt.NDArray[np.bool_]]:
    """So many rounds that chance plays no large part: rows of what `_play` returns, the same for the same question."""
    rng, draws = np.random.default_rng(0), max(DRAWS, _PLAYED // len(shares_K))
    mixtures, clear, seen = zip(*(_play(rng, shares_K, users, noise_std) for _ in range(draws)), strict=True)
    return np.stack(mixtures), np.stack(clear), np.stack(seen)


def _play(
    rng: np.random.Generator, shares_K: _Shares, users: int, noise_std: float
) -> tuple[_Shares, _Shares, npt.NDArray[np.bool_]]:
    """One round: the mixture that follows, the one without noise, and which topics stand out.

    A round that tells nothing but noise is not used, as in the cloud: the mixture stays even.
    """
    votes_K = rng.multinomial(users, shares_K).astype(np.float64)
    failed_K = rng.binomial(votes_K.astype(np.int64), FAILING_SHARE).astype(np.float64)
    noisy_seen_K, noisy_failed_K = (
        exact_K + noise_std * rng.standard_normal(len(exact_K)) for exact_K in (votes_K - failed_K, failed_K)
    )
    stands_out_K = (np.maximum(noisy_seen_K, noisy_failed_K) >= SIGNIFICANT * noise_std) | (
        noisy_seen_K + noisy_failed_K >= SIGNIFICANT * math.sqrt(2) * noise_std
    )
    told = noisy_seen_K.tolist(), noisy_failed_K.tolist()
    noisy = _mixture(*told, noise_std) if is_informative(*told, noise_std) else np.full_like(shares_K, 1 / len(votes_K))
    clear = _mixture(*shrink((votes_K - failed_K).tolist(), failed_K.tolist(), 0.0), 0.0)
    return noisy, clear, stands_out_K


def _mixture(seen_K: Sequence[float], failed_K: Sequence[float], noise_std: float) -> _Shares:
    return np.array(weights(seen_K, failed_K, noise_std))
