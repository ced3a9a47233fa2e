"""The loss of an engine on given tokens: what the probe of a release compares with its manifest."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Engine, Logits, StepEntry

# Logits of this many positions are held at a time.
_PIECE_TOKENS = 64


def sequence_loss(engine: Engine, token_ids: Sequence[int]) -> float:
    """Returns the mean negative log-likelihood of every token but the first, in nats per token.

    Raises:
        EbbflowError: INVALID_REQUEST for fewer than two tokens, or as `Engine.step` does.
    """
    if len(token_ids) <= 1:
        raise EbbflowError(Reason.INVALID_REQUEST, "a loss needs at least two tokens", field="token_ids")
    inputs, targets = token_ids[:-1], np.asarray(token_ids[1:])
    total = 0.0
    slot = engine.open()
    try:
        for begin in range(0, len(inputs), _PIECE_TOKENS):
            end = begin + _PIECE_TOKENS
            logits_TV = engine.step([StepEntry(slot, inputs[begin:end], "all")])[0]
            total += float(token_losses(logits_TV, targets[begin:end]).sum())
    finally:
        engine.close(slot)
    return total / len(inputs)


def token_losses(logits_TV: Logits, targets_T: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Returns -log softmax of each target, [T]."""
    wide_TV = logits_TV.astype(np.float64)
    most_T = wide_TV.max(axis=1)
    log_sum_T = np.log(np.exp(wide_TV - most_T[:, None]).sum(axis=1)) + most_T
    losses_T: npt.NDArray[np.float64] = log_sum_T - wide_TV[np.arange(len(targets_T)), targets_T]
    return losses_T
