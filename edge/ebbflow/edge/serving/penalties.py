"""Making tokens less likely that have come already, or that the caller does not want."""

from collections.abc import Sequence

import numpy as np

from ebbflow.edge.serving.vectors import Floats

_ROOM = 64


class Penalties:
    """What is done to the logits of one answer; its cost grows with the different tokens, not with the vocabulary."""

    def __init__(
        self,
        repetition: float,
        presence: float,
        frequency: float,
        biases: Sequence[tuple[int, float]],
        prompt_ids: Sequence[int],
    ) -> None:
        """Takes the penalties as in `Sampling`, and the tokens that count as having come."""
        self._repetition, self._presence, self._frequency = map(np.float32, (repetition, presence, frequency))
        self._bias_ids = np.array([id_ for id_, _ in biases], np.intp)
        self._biases = np.array([bias for _, bias in biases], np.float32)
        self._counting = repetition != 1.0 or presence != 0.0 or frequency != 0.0
        self._idle = not self._counting and not len(biases)
        came = list(dict.fromkeys(prompt_ids)) if repetition != 1.0 else []
        self._places = {id_: place for place, id_ in enumerate(came)}
        self._ids = np.zeros(len(came) + _ROOM, np.intp)
        self._ids[: len(came)] = came
        self._counts = np.zeros(len(self._ids), np.float32)  # in the answer

    def add(self, token_id: int) -> None:
        """Counts a token of the answer."""
        if not self._counting:
            return
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1.0

    def apply(self, logits_V: Floats) -> Floats:
        """Returns the logits to choose by; the same array where there is nothing to do, else a fresh one."""
        if self._idle:
            return logits_V
        changed_V = logits_V.copy()
        count = len(self._places)
        ids, counts = self._ids[:count], self._counts[:count]
        came = changed_V[ids]
        came = np.where(came > 0, came / self._repetition, came * self._repetition)
        changed_V[ids] = came - self._frequency * counts - self._presence * (counts > 0)
        changed_V[self._bias_ids] += self._biases
        return changed_V
