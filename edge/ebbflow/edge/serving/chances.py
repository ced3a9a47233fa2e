"""Log-probabilities of tokens: what an answer's tokens had against what could have stood in their place."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.edge.serving.vectors import Floats, largest, log_sum_exp

MAX_TOP_LOG_PROBS = 20


@dataclass(frozen=True)
class TokenChance:
    """A token and the natural logarithm of its probability, before temperature and penalties."""

    token_id: int
    token: bytes
    """UTF-8, which need not be whole characters."""
    log_prob: float
    top: tuple["TokenChance", ...] = ()
    """The likeliest tokens at this place, in falling order, without alternatives of their own."""
    offset: int = 0
    """Characters of the answer that were certain before it."""


def chance_of(token_id: int, logits_V: Floats, top: int, token_bytes: Callable[[int], bytes]) -> TokenChance:
    """Returns the chance of a token among the logits of its place, with `top` alternatives."""
    total = log_sum_exp(logits_V)
    ids = largest(logits_V, top) if top else _NONE
    alternatives = (TokenChance(int(id_), token_bytes(int(id_)), float(logits_V[id_]) - total) for id_ in ids)
    return TokenChance(token_id, token_bytes(token_id), float(logits_V[token_id]) - total, tuple(alternatives))


_NONE: npt.NDArray[np.intp] = np.zeros(0, np.intp)
