"""Private evolution: which prompts of a generation live on after a round, and how many new ones each of them gets.

Decisions without IO. Votes are sums of privatised batches, so that everything here is post-processing. The algorithm
is that of Xie et al., "Differentially Private Synthetic Data via Foundation Model APIs 2: Text" (2024), with four
changes: noisy votes are replaced by their best guesses (`shrinkage.shrink`) and not cut at a threshold; what earlier
rounds said counts on, without which a generation's quality falls again with the noise of the next; the best prompts
live on beside their variations; and some public texts join every generation, so that what nobody has proposed yet can
still be found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import population_pb2, round_pb2
from ebbflow.common.privacy.shrinkage import shrink
from ebbflow.common.privacy.significance import SIGNIFICANT, deviations, is_informative
from ebbflow.common.privacy.weights import FAILED_BOOST, FLOOR_SHARE

ELITE_SHARE = 0.65
"""Most of a generation that are prompts of the one before."""
STRANGER_SHARE = 0.25
"""Share of a generation that are public texts drawn by topic alone."""
MEMORY = 0.5
"""How much of a prompt's score is what its family had earned before this round."""
LEAST_SCORE = 0.25
"""A prompt lives on if its score is at least this much of the mean."""

Rows = npt.NDArray[np.float32]
"""Unit vectors of texts, [N, E]."""


@dataclass(frozen=True)
class Votes:
    """What a closed round says of its bins.

    Attributes:
        seen: noisy votes by bin whose answer was taken or not judged.
        failed: noisy votes by bin whose answer failed.
        noise_std: standard deviation of the noise on each of them, and on `near`.
        near: noisy number of users whose request was near its bin; None if the round did not count it.
    """

    seen: tuple[float, ...]
    failed: tuple[float, ...]
    noise_std: float
    near: float | None = None

    @classmethod
    def of(cls, plan: pb.RoundPlan, aggregate: round_pb2.Aggregate) -> "Votes":
        """Reads them off a round's aggregate."""
        kinds = [metric.kind for metric in plan.metrics]
        counted = pb.Metric.KIND_NEAR in kinds and len(aggregate.metrics) == len(kinds)
        return cls(
            tuple(bin_.seen for bin_ in aggregate.bins),
            tuple(bin_.failed for bin_ in aggregate.bins),
            aggregate.noise_std,
            aggregate.metrics[kinds.index(pb.Metric.KIND_NEAR)] if counted else None,
        )

    @property
    def totals(self) -> list[float]:
        """Noisy votes by bin, seen and failed together."""
        return [seen + failed for seen, failed in zip(self.seen, self.failed, strict=True)]

    def winners(self) -> list[int]:
        """Bins of which a cell, or both cells together, stand three standard deviations above the noise."""
        cells = zip(self.seen, self.failed, strict=True)
        return [at for at, (seen, failed) in enumerate(cells) if self._stands(max(seen, failed), seen + failed)]

    def _stands(self, cell: float, both: float) -> bool:
        least = SIGNIFICANT * self.noise_std
        return cell >= least > 0 or both >= least * math.sqrt(2) > 0

    def informs(self, topics: Sequence[str]) -> bool:
        """Whether any bin, or the bins of any topic together, stand higher above zero than noise would lift one."""
        if is_informative(self.seen, self.failed, self.noise_std):
            return True
        totals = by_topic(self.totals, topics)
        least = deviations(len(totals)) * self.noise_std * math.sqrt(2)
        return any(totals[topic] >= least * math.sqrt(list(topics).count(topic)) > 0 for topic in totals)

    def guesses(self) -> list[float]:
        """The best guess of the votes of each bin; none is negative."""
        seen, failed = self._shrunk()
        return [taken + missed for taken, missed in zip(seen, failed, strict=True)]

    def scores(self) -> list[float]:
        """What each bin is worth to the next student: votes that failed count more."""
        seen, failed = self._shrunk()
        return [taken + FAILED_BOOST * missed for taken, missed in zip(seen, failed, strict=True)]

    def _shrunk(self) -> tuple[Sequence[float], Sequence[float]]:
        return shrink(self.seen, self.failed, self.noise_std) if self.noise_std > 0 else (self.seen, self.failed)


def by_topic(values: Sequence[float], topics: Sequence[str]) -> dict[str, float]:
    """Adds up the values of each topic."""
    found: dict[str, float] = {}
    for value, topic in zip(values, topics, strict=True):
        found[topic] = found.get(topic, 0.0) + value
    return found


def quality(votes: Votes, crowding: float) -> population_pb2.Quality:
    """Says how good the generation was that was voted on.

    Args:
        votes: of the round on it.
        crowding: of its prompts.
    """
    guesses, winners = votes.guesses(), votes.winners()
    whole = math.fsum(guesses)
    shares = [guess / whole for guess in guesses if guess > 0] if whole > 0 else []
    near_share, near_error = _near(votes)
    return population_pb2.Quality(
        winners=len(winners),
        winners_share=math.fsum(guesses[at] for at in winners) / whole if whole > 0 else 0.0,
        near_share=near_share,
        near_error=near_error,
        effective_prompts=math.exp(-math.fsum(share * math.log(share) for share in shares)),
        crowding=crowding,
    )


def _near(votes: Votes) -> tuple[float, float]:
    """Share of users near their prompt, and its standard error by the noise: both sums carry some."""
    if votes.near is None:
        return -1.0, 0.0
    users = math.fsum(votes.totals)
    on_users = votes.noise_std * math.sqrt(2 * len(votes.seen))
    if users <= SIGNIFICANT * on_users:
        return 0.5, 0.5  # the round does not even say how many users there are
    share = min(1.0, max(0.0, votes.near / users))
    return share, min(0.5, math.hypot(votes.noise_std, share * on_users) / users)


def crowding(rows_NE: Rows) -> float:
    """Mean cosine between each prompt and its nearest neighbour; 1 means that all are alike, of a lone one too."""
    if len(rows_NE) <= 1:
        return 1.0
    cosines_NN = rows_NE @ rows_NE.T
    np.fill_diagonal(cosines_NN, -1.0)
    return float(np.clip(cosines_NN.max(axis=1), -1.0, 1.0).mean())


def remember(scores: Sequence[float], prompts: Sequence[population_pb2.Prompt]) -> list[float]:
    """Returns scores that earlier rounds count in, if the prompts came out of any.

    Args:
        scores: what this round says.
        prompts: what it voted on; their weights are what the rounds before said.
    """
    known = math.fsum(prompt.weight for prompt in prompts)
    if not any(prompt.parent for prompt in prompts) or known <= 0:
        return list(scores)
    whole = math.fsum(scores) / known
    earlier = [whole * prompt.weight for prompt in prompts]
    return [(1 - MEMORY) * score + MEMORY * before for score, before in zip(scores, earlier, strict=True)]


@dataclass(frozen=True)
class Brood:
    """How the next generation is made up.

    Attributes:
        elites: prompts that live on, best first.
        litters: number of new prompts by parent; a parent need not live on.
        strangers: number of public texts that are drawn by topic alone.
    """

    elites: tuple[int, ...]
    litters: dict[int, int]
    strangers: int


def breed(scores: Sequence[float], size: int, seed: int) -> Brood:
    """Decides how many children each prompt gets.

    Args:
        scores: of the generation that was voted on; not all zero.
        size: prompts of the next one.
        seed: of the draw.
    """
    mean = math.fsum(scores) / len(scores)
    best = sorted(range(len(scores)), key=lambda at: (-scores[at], at))
    elites = [at for at in best[: int(size * ELITE_SHARE)] if scores[at] >= LEAST_SCORE * mean]
    strangers = max(1, int(size * STRANGER_SHARE))
    drawn = systematic(scores, size - len(elites) - strangers, np.random.default_rng([seed, 1]))
    return Brood(tuple(elites), {at: int(count) for at, count in enumerate(drawn) if count}, strangers)


def systematic(scores: Sequence[float], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draws `count` times in proportion to the scores: each comes up its share of times, to within one.

    Source: Baker, "Reducing bias and inefficiency in the selection algorithm" (1987).
    """
    edges = np.cumsum(np.asarray(scores, np.float64) / math.fsum(scores))
    marks = (np.arange(count) + rng.random()) / max(1, count)
    places = np.minimum(np.searchsorted(edges, marks, side="right"), len(scores) - 1)
    return np.bincount(places, minlength=len(scores)).astype(np.int64)


def family_weights(scores: Sequence[float], families: Sequence[int | None]) -> list[float]:
    """Shares of the next generation's prompts in training texts; they sum to 1.

    A family, a prompt that lives on and the new ones made of it, gets what the prompt's votes earned, in even parts.
    Those of no family share a floor, so that nothing is trained on votes alone.

    Args:
        scores: of the generation that was voted on.
        families: for each new prompt the old one that it comes from, or None.
    """
    sizes = {family: families.count(family) for family in set(families)}
    earned = math.fsum(scores[family] for family in sizes if family is not None)
    floor = FLOOR_SHARE if None in sizes else 0.0
    if earned <= 0:
        return [1 / len(families)] * len(families)
    return [
        floor / sizes[None] if family is None else (1 - floor) * (scores[family] / earned) / sizes[family]
        for family in families
    ]
