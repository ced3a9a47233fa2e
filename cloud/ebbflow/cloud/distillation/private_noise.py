"""Randomness of private training, all of it from the operating system.

Opacus draws noise from torch's Mersenne Twister: whoever sees enough of its output knows all of it. Here every call has
a keystream of its own (AES-256 in counter mode under a fresh key), so nothing that could repeat noise is ever stored,
forked or resumed.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

_ADDENDS = 4
_CHUNK = 1 << 20  # values that are made together
_DENOMINATOR = 1 << 64
_MANTISSA_SHIFT = np.uint64(12)
_ONE = np.float64(1.0).view(np.uint64)


class Keystream:
    """Bytes that nobody can foresee or repeat; one object for one use."""

    def __init__(self) -> None:
        """Takes a key from the operating system."""
        self._cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def words(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        """Returns uniform 64-bit integers."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), np.uint64)

    def uniforms(self, count: int) -> Tensor:
        """Returns uniform multiples of 2^-52 in (0, 1], float64."""
        bits = self.words(count) >> _MANTISSA_SHIFT
        bits |= _ONE  # a number from 1 on and below 2, whose mantissa is random
        values = bits.view(np.float64)
        return torch.from_numpy(np.subtract(2.0, values, out=values))


def gaussian(count: int, std: float) -> Tensor:
    """Returns Gaussian noise, float64 [count].

    A sample is half the sum of four, each by Box and Muller: the gaps that floating point leaves between the values of
    one sample, and that give away what it was added to, are filled by the others (Holohan and Braghin, arXiv
    2107.10138; Opacus' secure mode does the same).
    """
    stream = Keystream()
    noise = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        noise[start:stop] = _summed_normals(stream, stop - start) * (std / math.sqrt(_ADDENDS))
    return noise


def _summed_normals(stream: Keystream, count: int) -> Tensor:
    """Returns sums of four standard normal samples, float64."""
    pairs = _ADDENDS // 2 * count
    radius = torch.sqrt_(torch.log_(stream.uniforms(pairs)).mul_(-2.0))
    angle = stream.uniforms(pairs).mul_(2.0 * math.pi)
    return torch.cos(angle).add_(torch.sin(angle)).mul_(radius).view(-1, count).sum(0)


def poisson_sample(count: int, batch_size: int, corpus_size: int) -> Sequence[int]:
    """Returns which of `count` texts are in a step: each with probability batch_size / corpus_size, on its own."""
    if batch_size >= corpus_size:
        return range(count)
    threshold = np.uint64(_DENOMINATOR * batch_size // corpus_size)  # rounded down: never more often than is accounted
    chosen: list[int] = np.flatnonzero(Keystream().words(count) < threshold).tolist()
    return chosen
