"""Choosing the next token from logits, in plain numpy.

The order is that of Hugging Face's transformers: penalties and bias, temperature, top-k, top-p of what is left, min-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.chances import MAX_TOP_LOG_PROBS
from ebbflow.edge.serving.penalties import Penalties
from ebbflow.edge.serving.vectors import Floats, Ids, at_least_kth, draw, nucleus

DEFAULT_MAX_TOKENS = 128
MAX_TEMPERATURE = 2.0
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_PENALTY = 2.0
"""Of presence and frequency, on either side of 0."""
MAX_REPETITION_PENALTY = 10.0
MAX_BIAS = 100.0
MAX_BIASES = 1024


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
    min_p: float = 0.0
    """Keep the tokens whose probability is at least this share of the likeliest one's."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that prompt or answer hold, or multiplies them where they are negative."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens once for each time that the answer holds them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their logits, from -100 to 100."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    seed: int | None = None
    """The same seed gives the same answer; None draws one."""
    top_log_probs: int | None = None
    """Likeliest alternatives to tell beside each token's log-probability; None tells no log-probabilities."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise _refuse("max_tokens", f"must be at least 1, not {self.max_tokens}")
        if not 0.0 <= self.temperature <= MAX_TEMPERATURE:
            raise _refuse("temperature", f"must lie between 0 and {MAX_TEMPERATURE:g}")
        if not 0.0 < self.top_p <= 1.0:
            raise _refuse("top_p", "must be above 0 and at most 1")
        if self.top_k < 0:
            raise _refuse("top_k", "must not be negative")
        if not 0.0 <= self.min_p <= 1.0:
            raise _refuse("min_p", "must lie between 0 and 1")
        self._check_penalties()
        if len(self.stop) > MAX_STOPS:
            raise _refuse("stop", f"may hold at most {MAX_STOPS} texts")
        if not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in self.stop):
            raise _refuse("stop", f"texts must have 1 to {MAX_STOP_CHARACTERS} characters")
        if not 0 <= (self.top_log_probs or 0) <= MAX_TOP_LOG_PROBS:
            raise _refuse("top_logprobs", f"must lie between 0 and {MAX_TOP_LOG_PROBS}")

    def choice(self, place: int) -> "Sampling":
        """The options of one of several answers to a prompt: with a seed, each has one of its own."""
        return self if self.seed is None else replace(self, seed=self.seed + place)

    def _check_penalties(self) -> None:
        if not 0.0 < self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise _refuse("repetition_penalty", f"must be above 0 and at most {MAX_REPETITION_PENALTY:g}")
        for field in ("presence_penalty", "frequency_penalty"):
            if not -MAX_PENALTY <= getattr(self, field) <= MAX_PENALTY:
                raise _refuse(field, f"must lie between {-MAX_PENALTY:g} and {MAX_PENALTY:g}")
        if len(self.logit_bias) > MAX_BIASES:
            raise _refuse("logit_bias", f"may hold at most {MAX_BIASES} tokens")
        if not all(-MAX_BIAS <= bias <= MAX_BIAS for _, bias in self.logit_bias):
            raise _refuse("logit_bias", f"must lie between {-MAX_BIAS:g} and {MAX_BIAS:g}")


class Sampler:
    """Draws tokens for one answer; owns its random numbers, so that neighbours in a batch change nothing."""

    def __init__(self, options: Sampling, prompt_ids: Sequence[int] = ()) -> None:
        """Prepares the random numbers from the seed, and the penalties from the prompt's tokens."""
        self._options = options
        seed = None if options.seed is None else options.seed % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._penalties = Penalties(
            options.repetition_penalty,
            options.presence_penalty,
            options.frequency_penalty,
            options.logit_bias,
            prompt_ids,
        )

    def pick(self, logits_V: Floats) -> int:
        """Returns the next token's id, which counts as part of the answer from then on.

        Raises:
            EbbflowError: INTERNAL if the logits are not numbers.
        """
        logits_V = self._penalties.apply(logits_V)
        best = int(np.argmax(logits_V))
        if not np.isfinite(logits_V[best]):
            raise EbbflowError(Reason.INTERNAL, "the engine returned logits that are not finite")
        greedy = self._options.temperature == 0.0 or self._options.top_k == 1
        token = best if greedy else self._drawn(logits_V, float(logits_V[best]))
        self._penalties.add(token)
        return token

    def _drawn(self, logits_V: Floats, most: float) -> int:
        # The smallest temperature that a float32 can divide by is as good as none.
        weights_V = np.exp((logits_V - np.float32(most)) * np.float32(min(1.0 / self._options.temperature, 1e30)))
        kept = _kept(weights_V, self._options)
        if kept is None:
            return draw(weights_V, self._random.random())
        return int(kept[draw(weights_V[kept], self._random.random())])


def _kept(weights_V: Floats, options: Sampling) -> Ids | None:
    """The ids that may be drawn, given weights of which the greatest is 1; None for all."""
    kept: Ids | None = None
    if 0 < options.top_k < len(weights_V):
        kept = at_least_kth(weights_V, options.top_k)
    if options.top_p < 1.0:
        inside = nucleus(weights_V if kept is None else weights_V[kept], options.top_p)
        kept = inside if kept is None else kept[inside]
    if options.min_p > 0.0:
        likely = (weights_V if kept is None else weights_V[kept]) >= options.min_p
        kept = np.flatnonzero(likely) if kept is None else kept[likely]
    return kept
