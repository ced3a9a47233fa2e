"""What noisy counts say of the true ones: the best guess of each, given all of them. It is post-processing, and free.

A count below the noise is best guessed from its neighbours: if all counts look like noise around one value, that value
is the guess for each; if a few stand out, those keep theirs and the others share the rest. How true counts are spread
is not assumed but learnt from the noisy ones by maximum likelihood (Kiefer and Wolfowitz 1956), and each guess is the
posterior mean under it, which is nearly as good as if the spread were known (Jiang and Zhang, "General maximum
likelihood empirical Bayes estimation of normal means", 2009). Cutting negative counts at zero instead would give all
bins that nobody asked for a share of their noise.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TOTALS = 40
"""How many totals of a bin are considered besides the noisy ones, denser near zero."""
RATES = 9
"""How many shares of failed votes."""
STEPS = 20
"""Of expectation maximisation, begun from an even spread: more would learn the noise of a small fleet by heart."""

_Array = npt.NDArray[np.float64]


def shrink(seen: Sequence[float], failed: Sequence[float], noise_std: float) -> tuple[list[float], list[float]]:
    """Returns the best guesses of votes seen and votes failed, by bin; none is negative.

    Both counts of a bin are judged together, and the chance by which users turn up in a round counts as noise too: what
    is wanted is how many will ask, not how many did.

    Args:
        seen: noisy votes by bin whose answer was taken or not judged; at least one bin.
        failed: noisy votes by bin whose answer failed.
        noise_std: standard deviation of the noise on each count, at least 0.
    """
    noisy_K2 = np.stack([np.asarray(seen, np.float64), np.asarray(failed, np.float64)], axis=1)
    atoms_A2 = _atoms(noisy_K2, noise_std)
    likelihood_KA = _likelihood(noisy_K2, atoms_A2, noise_std)
    weight_A = np.full(len(atoms_A2), 1 / len(atoms_A2))
    for _ in range(STEPS):
        weight_A = _posterior(likelihood_KA, weight_A).mean(axis=0)
    guesses_K2 = _posterior(likelihood_KA, weight_A) @ atoms_A2
    return guesses_K2[:, 0].tolist(), guesses_K2[:, 1].tolist()


def _atoms(noisy_K2: _Array, noise_std: float) -> _Array:
    """The true counts that are considered: a grid up to the largest, and the noisy counts where they could be true."""
    largest = max(float(noisy_K2.sum(axis=1).max()) + 2 * noise_std, 1.0)
    totals_T1 = largest * np.linspace(0, 1, TOTALS)[:, None] ** 2
    rates_R = np.linspace(0, 1, RATES)[None, :]
    grid_A2 = np.stack([totals_T1 * (1 - rates_R), totals_T1 * rates_R], axis=2).reshape(-1, 2)
    return np.concatenate([grid_A2, np.maximum(noisy_K2, 0.0)])


def _likelihood(noisy_K2: _Array, atoms_A2: _Array, noise_std: float) -> _Array:
    """How likely each bin's noisy counts are by each pair of true ones, up to a factor of the bin's own."""
    variance_A2 = noise_std**2 + np.maximum(atoms_A2, 1.0)
    deviation_KA2 = (noisy_K2[:, None, :] - atoms_A2) ** 2 / variance_A2 + np.log(variance_A2)
    log_KA = -0.5 * deviation_KA2.sum(axis=2)
    likelihood_KA: _Array = np.exp(log_KA - log_KA.max(axis=1, keepdims=True))
    return likelihood_KA


def _posterior(likelihood_KA: _Array, weight_A: _Array) -> _Array:
    joint_KA = likelihood_KA * weight_A
    posterior_KA: _Array = joint_KA / joint_KA.sum(axis=1, keepdims=True)
    return posterior_KA
