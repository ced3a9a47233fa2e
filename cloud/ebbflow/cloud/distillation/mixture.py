"""Which tokens a run trains on, and in which order: a pure function of corpus, mixture and seed.

Documents are drawn by topic with the shares of the mixture, and within a topic in a fresh shuffle for each pass. Laid
end to end they make a stream; sequence i is its i-th window. Nothing is consumed: any sequence can be read at any time,
so a resumed run needs to know only its step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer

Ids = npt.NDArray[np.int64]
_BLOCK = 256  # documents drawn together; their topics have exact shares to within one document


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of documents as every station sees them: begin (where the tokenizer has one), text, end."""
    return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts, bos=True)]


@dataclass(frozen=True)
class Documents:
    """Tokenised texts.

    Attributes:
        tokens: all token ids, end to end.
        starts: where each document begins in `tokens`, and the end of the last.
        topics: topic of each document.
        begin_id: token that begins every document and is never predicted; None if documents have none.
    """

    tokens: npt.NDArray[np.int32]
    starts: Ids
    topics: list[str]
    begin_id: int | None

    @classmethod
    def encode(cls, texts: Sequence[Text], tokenizer: Tokenizer) -> "Documents":
        """Tokenises texts."""
        encoded = [np.asarray(ids, np.int32) for ids in encode_documents(tokenizer, [text.text for text in texts])]
        starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        tokens = np.concatenate(encoded) if encoded else np.zeros(0, np.int32)
        return cls(tokens, starts, [text.topic for text in texts], tokenizer.bos_id)


def shares(mixture: Mapping[str, float], topics: Sequence[str]) -> dict[str, float]:
    """Returns the share of each topic in the training documents; they sum to 1.

    Args:
        mixture: wanted weights by topic; empty leaves the proportions of `topics`.
        topics: topic of each document there is.

    Raises:
        EbbflowError: INVALID_REQUEST if a weight is not a number of at least 0, all are 0, or a wanted topic has no
            document.
    """
    if not mixture:
        names, counts = np.unique(np.asarray(topics), return_counts=True)
        return {str(name): int(count) / len(topics) for name, count in zip(names, counts, strict=True)}
    for topic, weight in mixture.items():
        if not (np.isfinite(weight) and weight >= 0):
            raise _invalid(f"the mixture's weight of {topic[:80]!r} must be a number of at least 0")
    total = sum(mixture.values())
    if total <= 0:
        raise _invalid("the mixture gives no topic any weight")
    if missing := sorted(topic for topic, weight in mixture.items() if weight > 0 and topic not in set(topics)):
        raise _invalid(f"the corpus has no training text of topic {missing[0][:80]!r}, which the mixture asks for")
    return {topic: weight / total for topic, weight in sorted(mixture.items()) if weight > 0}


def _invalid(message: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, message, field="mixture")


class Sequences:
    """The training sequences of one run, by number."""

    def __init__(
        self, documents: Documents, mixture: Mapping[str, float], *, length: int, count: int, seed: int
    ) -> None:
        """Lays out `count` sequences.

        Args:
            documents: what to draw from.
            mixture: weights by topic; empty leaves the documents' own proportions.
            length: positions of one sequence that are trained; one more token is read.
            count: how many sequences there are.
            seed: of every choice.

        Raises:
            EbbflowError: as `shares`.
        """
        self._documents = documents
        self._length = length
        self._count = count
        lengths = np.diff(documents.starts)
        self._drawn = _draw(documents.topics, lengths, shares(mixture, documents.topics), count * length + 1, seed)
        self._ends = np.cumsum(lengths[self._drawn])

    def __len__(self) -> int:
        return self._count

    def topic_shares(self) -> dict[str, float]:
        """Returns the share of each topic in the documents that were drawn."""
        topics = [self._documents.topics[i] for i in self._drawn]
        return shares({}, topics)

    def batch(self, first: int, count: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Returns sequences `first` to `first + count - 1`.

        Returns:
            tokens [count, length + 1], of which the last is the first of the next sequence, and what is not to be
            predicted among them: tokens that begin a document.
        """
        size = self._length
        tokens_BS = np.stack([self._window(i * size, i * size + size + 1) for i in range(first, first + count)])
        begin = self._documents.begin_id
        ignored_BS = np.zeros(tokens_BS.shape, np.bool_) if begin is None else tokens_BS == begin
        return tokens_BS, ignored_BS

    def _window(self, start: int, stop: int) -> Ids:
        """Returns a stretch of the stream."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        starts = self._documents.starts
        parts = [self._documents.tokens[starts[i] : starts[i + 1]] for i in self._drawn[first : last + 1]]
        offset = start - int(self._ends[first] - len(parts[0]))
        return np.concatenate(parts)[offset : offset + stop - start].astype(np.int64)


def _draw(topics: Sequence[str], lengths: Ids, share: Mapping[str, float], tokens: int, seed: int) -> Ids:
    """Returns document numbers whose lengths sum to at least `tokens`."""
    names = sorted(share)
    members = [np.flatnonzero(np.asarray(topics) == name) for name in names]
    edges = np.cumsum([share[name] for name in names])
    rng = np.random.default_rng([seed, 0])
    seen = np.zeros(len(names), np.int64)
    blocks: list[Ids] = []
    have = 0
    while have < tokens:
        strata = (rng.permutation(_BLOCK) + rng.random(_BLOCK)) / _BLOCK
        picked = np.minimum(np.searchsorted(edges, strata, side="right"), len(names) - 1)
        block = np.empty(_BLOCK, np.int64)
        for topic, documents in enumerate(members):
            where = np.flatnonzero(picked == topic)
            turns = seen[topic] + np.arange(len(where))
            block[where] = _shuffled(documents, turns, [seed, 1, topic])
            seen[topic] += len(where)
        blocks.append(block)
        have += int(lengths[block].sum())
    return np.concatenate(blocks)


def _shuffled(documents: Ids, turns: Ids, seed: list[int]) -> Ids:
    """Returns the documents whose turn it is; each pass over them has its own order."""
    passes, places = np.divmod(turns, len(documents))
    chosen = np.empty(len(turns), np.int64)
    for number in np.unique(passes):
        order = np.random.default_rng([*seed, int(number)]).permutation(documents)
        chosen[passes == number] = order[places[passes == number]]
    return chosen


def pad(documents: Iterable[Sequence[int]], begin_id: int | None, fill: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Lays documents of unequal length side by side, for measuring.

    Returns:
        tokens [B, S] filled up with `fill`, and what is not to be predicted: the filling and tokens that begin a
        document.
    """
    rows = [np.asarray(document, np.int64) for document in documents]
    tokens_BS = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    ignored_BS = np.ones(tokens_BS.shape, np.bool_)
    for row, document in enumerate(rows):
        tokens_BS[row, : len(document)] = document
        ignored_BS[row, : len(document)] = False if begin_id is None else document == begin_id
    return tokens_BS, ignored_BS
