"""Public texts of a corpus, laid out by likeness, to draw prompts from. No IO, no torch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.feedback.evolution import Rows, systematic

POOL_TEXTS = 2_000
"""Texts that are looked at; of larger corpora a sample, as many of each topic as of any other."""
MOST_CHARACTERS = 2_000
"""Longer texts are no prompts."""
_LLOYD_STEPS = 8
_NEIGHBOURS = 48
_TEMPERATURE = 0.5
"""Drawn more narrowly, new prompts crowd around old ones, and what they miss is asked in vain."""

Embed = Callable[[Sequence[str]], npt.NDArray[np.floating]]
"""Turns texts into vectors, one row for each."""


def sample(texts: Sequence[Text], seed: int, most: int = POOL_TEXTS) -> list[Text]:
    """Chooses the public texts of a pool, in the order of the corpus.

    Texts that only measure (split "gate") are left out, and so are copies and texts too long to be a prompt.
    """
    places: dict[str, list[int]] = {}
    known: set[str] = set()
    for place, text in enumerate(texts):
        if text.split != "gate" and len(text.text) <= MOST_CHARACTERS and text.text not in known:
            known.add(text.text)
            places.setdefault(text.topic, []).append(place)
    rng = np.random.default_rng([seed, 2])
    shuffled = [rng.permutation(found).tolist() for found in places.values()]
    turns = [(turn, place) for found in shuffled for turn, place in enumerate(found)]
    return [texts[place] for place in sorted(place for _, place in sorted(turns)[:most])]


class Space:
    """Likeness as directions around the mean of the public texts, as on the devices around the mean of the bins."""

    def __init__(self, embed: Embed, texts: Sequence[str]) -> None:
        """Learns the mean."""
        rows_NE = np.asarray(embed(texts), np.float32)
        self._embed = embed
        self._centre_E = rows_NE.mean(axis=0) if len(rows_NE) > 1 else np.zeros_like(rows_NE[0])

    def rows(self, texts: Sequence[str]) -> Rows:
        """Returns one unit vector for each text."""
        rows_NE = np.asarray(self._embed(texts), np.float32) - self._centre_E
        lengths_N1 = np.linalg.norm(rows_NE, axis=1, keepdims=True)
        unit_NE: Rows = rows_NE / np.where(lengths_N1 > 0, lengths_N1, 1.0)
        return unit_NE


@dataclass(frozen=True)
class Pool:
    """Public texts and their directions.

    Attributes:
        texts: the texts.
        rows_NE: their unit vectors.
    """

    texts: Sequence[Text]
    rows_NE: Rows

    @property
    def topics(self) -> list[str]:
        """Topic of each text."""
        return [text.topic for text in self.texts]

    def draw_by_topic(
        self, weights: Mapping[str, float], count: int, taken: Collection[str], rng: np.random.Generator
    ) -> list[int]:
        """Draws texts that stand for their topics: the one in the middle of each cluster.

        Args:
            weights: share by topic; topics of no weight or without texts are passed over.
            count: how many; fewer come back where there are not so many.
            taken: texts that are not to be drawn.
            rng: of every choice.
        """
        free = {
            topic: [at for at, text in enumerate(self.texts) if text.topic == topic and text.text not in taken]
            for topic in dict.fromkeys(self.topics)
            if weights.get(topic, 0.0) > 0
        }
        drawn: list[int] = []
        while len(drawn) < count and any(free.values()):
            topics = [topic for topic in free if free[topic]]
            counts = systematic([weights[topic] for topic in topics], count - len(drawn), rng)
            for topic, wanted in zip(topics, counts, strict=True):
                found = self._medoids(free[topic], min(int(wanted), len(free[topic])), rng)
                free[topic] = [at for at in free[topic] if at not in set(found)]
                drawn += found
        return drawn

    def draw_near(
        self, row_E: npt.NDArray[np.float32], count: int, taken: Collection[str], rng: np.random.Generator
    ) -> list[int]:
        """Draws texts like a given one: the liker, the likelier."""
        cosines_N = self.rows_NE @ row_E
        free = [int(at) for at in np.argsort(-cosines_N, kind="stable") if self.texts[at].text not in taken]
        nearest = free[: max(_NEIGHBOURS, 2 * count)]
        luck = rng.gumbel(size=len(nearest)) + cosines_N[nearest] / _TEMPERATURE
        return [nearest[at] for at in np.argsort(-luck, kind="stable")[:count]]

    def neighbours(self, row_E: npt.NDArray[np.float32], topic: str, count: int) -> list[str]:
        """Returns the texts of a topic that are most like a given one; of any topic where it has none."""
        cosines_N = self.rows_NE @ row_E
        same = [at for at in np.argsort(-cosines_N, kind="stable") if self.texts[at].topic == topic]
        return [self.texts[at].text for at in same[:count]]

    def _medoids(self, places: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
        """The texts in the middle of `count` clusters (spherical k-means, begun as Arthur and Vassilvitskii 2007)."""
        if count <= 0:
            return []
        rows_NE = self.rows_NE[list(places)]
        centres_KE = rows_NE[_spread(rows_NE, count, rng)]
        for _ in range(_LLOYD_STEPS):
            nearest_N = np.argmax(rows_NE @ centres_KE.T, axis=1)
            sums_KE = np.stack([rows_NE[nearest_N == k].sum(axis=0) for k in range(count)])
            lengths_K1 = np.linalg.norm(sums_KE, axis=1, keepdims=True)
            centres_KE = np.where(lengths_K1 > 0, sums_KE / np.where(lengths_K1 > 0, lengths_K1, 1), centres_KE)
        chosen: list[int] = []
        for k in range(count):
            order = np.argsort(-(rows_NE @ centres_KE[k]), kind="stable")
            chosen.append(next(int(at) for at in order if int(at) not in chosen))
        return [places[at] for at in chosen]


def _spread(rows_NE: Rows, count: int, rng: np.random.Generator) -> list[int]:
    """Draws rows that lie apart: each in proportion to its squared distance from those before."""
    chosen = [int(rng.integers(len(rows_NE)))]
    distance_N = np.full(len(rows_NE), np.inf)
    while len(chosen) < count:
        distance_N = np.minimum(distance_N, np.maximum(0.0, 2 - 2 * (rows_NE @ rows_NE[chosen[-1]])))
        distance_N[chosen] = 0.0
        whole = float(distance_N.sum())
        free = np.setdiff1d(np.arange(len(rows_NE)), chosen)
        share = distance_N / whole if whole > 0 else np.isin(np.arange(len(rows_NE)), free) / len(free)
        chosen.append(int(rng.choice(len(rows_NE), p=share)))
    return chosen
