"""Arithmetic over a whole vocabulary that costs a fraction of an engine's step: float32, few passes, no full sort."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

_BLOCK = 256


def log_sum_exp(logits_V: Floats) -> float:
    """Returns log(sum(exp(logits)))."""
    most = logits_V.max()
    return float(np.log(np.exp(logits_V - most).sum(dtype=np.float32))) + float(most)


def unit(vector: Floats) -> Floats:
    """Returns a vector with the length 1, or as it is if it has none."""
    length = np.linalg.norm(vector)
    return vector / length if length > 0 else vector


def largest(values_V: Floats, count: int) -> Ids:
    """The ids of the `count` largest values, largest first, equal ones by id."""
    ids = at_least_kth(values_V, count)
    return ids[np.argsort(-values_V[ids], kind="stable")]


def at_least_kth(values_V: Floats, count: int) -> Ids:
    """The ids of the `count` largest values in rising order; of values equal to the least of them, the lowest ids."""
    if count >= len(values_V):
        return np.arange(len(values_V))
    kth = np.partition(values_V, len(values_V) - count)[len(values_V) - count]
    return _down_to(values_V, kth, count)


def nucleus(weights_N: Floats, share: float) -> Ids:
    """The places of the fewest weights whose sum is at least a share below 1 of all, in rising order.

    Weights under the mean of what may be left out cannot all be needed, so only those above it are sorted.
    """
    total = float(weights_N.sum())
    falling = weights_N[weights_N >= np.float32((1.0 - share) * total / len(weights_N))]
    falling = np.sort(falling)[::-1]
    last = _reached(falling, share * total, "left")
    return _down_to(weights_N, falling[last], last + 1)


def _down_to(values_N: Floats, least: np.float32, count: int) -> Ids:
    """The places of all above `least`, and of the first that equal it until there are `count`, in rising order."""
    kept = values_N > least
    kept[np.flatnonzero(values_N == least)[: count - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept)


def draw(weights_N: Floats, share: float) -> int:
    """Returns the place where a share of the total weight is passed: a random share below 1 draws by weight."""
    place = _reached(weights_N, share * float(weights_N.sum()), "right")
    while weights_N[place] == 0.0 and place > 0:  # where rounding ends on a weight of nothing, one before it is meant
        place -= 1
    return place


def _reached(weights_N: Floats, target: float, side: Literal["left", "right"]) -> int:
    """The first place at which the running sum reaches a target ("right": exceeds it), or the last place.

    Sums of blocks come first, then one block is looked at more closely: a running sum of all takes 30 times as long.
    """
    whole = len(weights_N) // _BLOCK * _BLOCK
    sums = [weights_N[:whole].reshape(-1, _BLOCK).sum(axis=1), weights_N[whole:].sum(keepdims=True)]
    blocks = np.cumsum(np.concatenate(sums), dtype=np.float64)
    block = min(int(np.searchsorted(blocks, target, side)), len(blocks) - 1)
    inside = np.cumsum(weights_N[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    place = int(np.searchsorted(inside, target - (blocks[block - 1] if block else 0.0), side))
    return min(block * _BLOCK + place, len(weights_N) - 1)
