"""Which texts a text is like, by the words that they share: tf-idf over the student's tokens.

The weights come from public texts alone (a plan's, on devices), so that no user's text moves another user's vote. A
small student's hidden states say less about the topic of a short prompt than its rare tokens do
(docs/adr/0007-lexical-votes.md).

Source: Spärck Jones, "A statistical interpretation of term specificity" (1972), with logarithmic term counts.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt


class Lexicon:
    """Turns texts into unit vectors over the vocabulary; callable as the devices' `votes.Embed`."""

    def __init__(self, texts: Sequence[str], encode: Callable[[str], Sequence[int]], vocabulary_size: int) -> None:
        """Weighs every token by how few of the texts have it; a token that none has weighs nothing.

        Args:
            texts: the public texts of all bins.
            encode: the student's tokenizer.
            vocabulary_size: number of its tokens.
        """
        self._encode, self._size = encode, vocabulary_size
        containing_V = np.zeros(vocabulary_size)
        for text in texts:
            containing_V[np.unique(np.asarray(encode(text), np.int64))] += 1
        rarity_V = np.log((1 + len(texts)) / (1 + containing_V))
        self._weight_V = np.where(containing_V > 0, rarity_V, 0.0)

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Returns one row for each text, of length 1, or 0 where the text has no known token."""
        return np.stack([self._row(text) for text in texts])

    def _row(self, text: str) -> npt.NDArray[np.float64]:
        counts_V = np.bincount(np.asarray(self._encode(text), np.int64), minlength=self._size)
        row_V: npt.NDArray[np.float64] = np.log1p(counts_V) * self._weight_V
        return row_V / max(float(np.linalg.norm(row_V)), 1e-12)
