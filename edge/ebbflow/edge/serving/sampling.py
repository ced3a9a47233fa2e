"""Choosing the next token from logits, in plain numpy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason

Floats = npt.NDArray[np.float32]

DEFAULT_MAX_TOKENS = 128
MAX_TEMPERATURE = 2.0
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
# Sorting a whole vocabulary for every token is slow; the nucleus nearly always lies among this many.
_NUCLEUS_CANDIDATES = 256


def _refuse(field: str, message: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, f"{field} {message}", field=field)


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Raises:
        EbbflowError: INVALID_REQUEST, with the field's name in `metadata`, when a value is out of range.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    """Most tokens to generate."""
    temperature: float = 1.0
    """Softmax temperature from 0 to 2; 0 picks the likeliest token."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    seed: int | None = None
    """The same seed gives the same answer; None draws one."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise _refuse("max_tokens", f"must be at least 1, not {self.max_tokens}")
        if not 0.0 <= self.temperature <= MAX_TEMPERATURE:
            raise _refuse("temperature", f"must lie between 0 and {MAX_TEMPERATURE:g}")
        if not 0.0 < self.top_p <= 1.0:
            raise _refuse("top_p", "must be above 0 and at most 1")
        if self.top_k < 0:
            raise _refuse("top_k", "must not be negative")
        if len(self.stop) > MAX_STOPS:
            raise _refuse("stop", f"may hold at most {MAX_STOPS} texts")
        if not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in self.stop):
            raise _refuse("stop", f"texts must have 1 to {MAX_STOP_CHARACTERS} characters")


class Sampler:
    """Draws tokens for one answer; owns its random numbers, so that neighbours in a batch change nothing."""

    def __init__(self, options: Sampling) -> None:
        """Prepares the random numbers from the seed."""
        self._options = options
        seed = None if options.seed is None else options.seed % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits_V: Floats) -> int:
        """Returns the next token's id.

        Raises:
            EbbflowError: INTERNAL if the logits are not numbers.
        """
        best = int(np.argmax(logits_V))
        if not np.isfinite(logits_V[best]):
            raise EbbflowError(Reason.INTERNAL, "the engine returned logits that are not finite")
        if self._options.temperature == 0.0 or self._options.top_k == 1:
            return best
        ids, probabilities = self._candidates(logits_V)
        cumulative = np.cumsum(probabilities)
        place = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def _candidates(self, logits_V: Floats) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """The ids that may be drawn and their weights; in falling order unless every token may be drawn."""
        scaled_V = logits_V.astype(np.float64) / self._options.temperature
        weights_V = np.exp(scaled_V - scaled_V.max())
        top_k, top_p = self._options.top_k or len(logits_V), self._options.top_p
        if top_p == 1.0 and top_k >= len(logits_V):
            return np.arange(len(logits_V)), weights_V
        ids = _largest(weights_V, top_k if top_p == 1.0 else min(top_k, _NUCLEUS_CANDIDATES))
        if top_p < 1.0:
            if top_k > len(ids) and weights_V[ids].sum() < top_p * weights_V.sum():
                ids = _largest(weights_V, top_k)
            total = weights_V[ids].sum() if top_k < len(logits_V) else weights_V.sum()
            ids = ids[: int(np.searchsorted(np.cumsum(weights_V[ids]), top_p * total)) + 1]
        return ids, weights_V[ids]


def _largest(weights_V: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """The ids of the `count` largest weights, largest first, equal ones by id."""
    count = min(count, len(weights_V))
    ids = np.sort(np.argpartition(-weights_V, count - 1)[:count])
    return ids[np.argsort(-weights_V[ids], kind="stable")]
