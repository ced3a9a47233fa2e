"""The loss of an engine on given tokens: what the probe of a release compares with its manifest."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Engine, Logits, StepEntry

# Logits of this many positions are held at a time.
_PIECE_TOKENS = 32
# Arrays of this size are used again by the allocator; those of a whole piece would be mapped, page by page, each time.
_BLOCK_NUMBERS = 1 << 18


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
    count, vocabulary = logits_TV.shape
    rows = max(1, _BLOCK_NUMBERS // vocabulary)
    losses_T = np.empty(count, np.float64)
    for begin in range(0, count, rows):
        block_RV, targets_R = logits_TV[begin : begin + rows], targets_T[begin : begin + rows]
        most_R = block_RV.max(axis=1)
        sum_R = np.exp(block_RV - most_R[:, None]).sum(axis=1, dtype=np.float64)
        chosen_R = block_RV[np.arange(len(targets_R)), targets_R]
        losses_T[begin : begin + rows] = np.log(sum_R) + most_R - chosen_R
    return losses_T
