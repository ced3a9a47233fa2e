"""Whether a text that a teacher wrote is a good variation of a prompt: measured on public texts, no torch.

A teacher that is too weak writes word salad, repeats itself or copies what it has learnt by heart. Then its texts would
be worse than public ones, and a generation falls back to those.
"""

import enum
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from ebbflow.cloud.feedback.evolution import Rows

Encode = Callable[[str], Sequence[int]]

ABLE_SHARE = 0.25
"""A teacher can vary prompts if at least this share of its attempts is good."""
ATTEMPTS = 4
"""For each new prompt, before a public text takes its place."""
TRIAL = 32
"""Attempts by which that is measured."""
MOST_LIKE = 0.98
"""A text with a larger cosine to one that is there already adds nothing."""
_HELD_OUT_QUANTILE = 0.95
_SLACK_NATS = 0.5
_LIKER_QUANTILE = 0.75
_DISTINCT_QUANTILE = 0.01
_BIGRAM, _UNIGRAM, _UNIFORM = 0.7, 0.25, 0.05


class Verdict(enum.Enum):
    """What is wrong with a text; its value says so in a sentence about many."""

    GOOD = "good"
    EMPTY = "without an end or empty"
    COPY = "copies"
    GARBLED = "garbled"
    ASTRAY = "unlike their prompt"


class Bigrams:
    """How probable a text is by pairs of tokens, mixed with single ones: Jelinek and Mercer's interpolation (1980)."""

    def __init__(self, texts: Sequence[Sequence[int]], vocabulary_size: int) -> None:
        """Counts.

        Args:
            texts: token ids of each public text.
            vocabulary_size: number of tokens there are.
        """
        self._end, self._size = vocabulary_size, vocabulary_size + 1
        self._singles: Counter[int] = Counter()
        self._befores: Counter[int] = Counter()
        self._pairs: Counter[tuple[int, int]] = Counter()
        for text in texts:
            ids = [self._end, *text, self._end]
            self._singles.update(ids[1:])
            self._befores.update(ids[:-1])
            self._pairs.update(itertools.pairwise(ids))
        self._whole = max(1, self._singles.total())

    def nats_per_token(self, ids: Sequence[int]) -> float:
        """Mean negative logarithm of the probability of a text's tokens and its end."""
        path = [self._end, *ids, self._end]
        probabilities = [self._probability(before, after) for before, after in itertools.pairwise(path)]
        return float(-np.log(probabilities).mean())

    def _probability(self, before: int, after: int) -> float:
        pairs = self._pairs[before, after] / max(1, self._befores[before])
        return _BIGRAM * pairs + _UNIGRAM * self._singles[after] / self._whole + _UNIFORM / self._size


class Judge:
    """Judges variations by what public texts are like."""

    def __init__(
        self, public: Sequence[str], rows_NE: Rows, encode: Encode, vocabulary_size: int, known: Collection[str] = ()
    ) -> None:
        """Learns what is usual.

        Args:
            public: public texts of the corpus.
            rows_NE: their unit vectors.
            encode: the teacher's tokenizer.
            vocabulary_size: number of its tokens.
            known: other texts that a variation must not repeat.
        """
        self._encode, self._rows_NE = encode, rows_NE
        self._known = {_plain(text) for text in (*public, *known)}
        encoded = [list(encode(public[at])) for at in np.random.default_rng(0).permutation(len(public))]
        half = len(encoded) // 2
        self._bigrams = Bigrams(encoded[half:], vocabulary_size)
        held_out = encoded[:half] or encoded
        usual = [self._bigrams.nats_per_token(ids) for ids in held_out]
        self._most_nats = float(np.quantile(usual, _HELD_OUT_QUANTILE)) + _SLACK_NATS
        self._least_distinct = float(np.quantile([_distinct(ids) for ids in encoded], _DISTINCT_QUANTILE))
        self.most_tokens = int(np.quantile([len(ids) for ids in encoded], _HELD_OUT_QUANTILE)) + 1

    def judge(self, text: str, row_E: npt.NDArray[np.float32], parent_E: npt.NDArray[np.float32]) -> Verdict:
        """Says whether a text is a good variation.

        A good one has an end, is no copy, is about as probable as public texts that were not counted, does not repeat
        itself more than they do, and is liker to its prompt than three in four of them are.

        Args:
            text: as the teacher wrote it; empty if it found no end.
            row_E: its unit vector.
            parent_E: that of the prompt that it varies.
        """
        ids = list(self._encode(text))
        if not text.strip() or not ids:
            return Verdict.EMPTY
        if _plain(text) in self._known:
            return Verdict.COPY
        if self._bigrams.nats_per_token(ids) > self._most_nats or _distinct(ids) < self._least_distinct:
            return Verdict.GARBLED
        usual = float(np.quantile(self._rows_NE @ parent_E, _LIKER_QUANTILE))
        return Verdict.GOOD if float(row_E @ parent_E) > usual else Verdict.ASTRAY

    def keep(self, text: str) -> None:
        """Remembers a text, which no other may repeat."""
        self._known.add(_plain(text))


def _plain(text: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text.casefold()).split())


def _distinct(ids: Sequence[int]) -> float:
    return len(set(ids)) / len(ids) if ids else 0.0


def shortfall(verdicts: Counter[Verdict]) -> str:
    """Says in words why a teacher cannot vary prompts."""
    faults = [f"{count} {verdict.value}" for verdict, count in verdicts.most_common() if verdict is not Verdict.GOOD]
    good, whole = verdicts[Verdict.GOOD], verdicts.total()
    return f"the teacher varied {good} of {whole} prompts well, and {ABLE_SHARE:.0%} are needed: {', '.join(faults)}"
