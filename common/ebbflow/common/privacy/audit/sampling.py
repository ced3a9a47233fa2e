"""Whether noise has the distribution that it should, and whether one sample tells anything about another.

Every function returns a p-value: the probability, or an upper bound on it, that correct noise looks at least so wrong.
"""

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ebbflow.common.privacy.gaussian import probabilities, tail

Samples = npt.NDArray[np.int64]

_LEAST_EXPECTED = 10.0
"""Cells of the chi-square test are merged until each expects so many samples."""
_CLASSES = 6


def fit_p_value(samples: Samples, variance: Fraction) -> float:
    """P-value of samples under the exact discrete Gaussian, by a chi-square test.

    Args:
        samples: independent values.
        variance: parameter sigma² of the distribution.
    """
    from scipy.stats import chisquare

    reach = tail(variance)
    if (np.abs(samples) > reach).any():
        return 0.0  # the sampler cannot make them
    expected = np.array(probabilities(float(variance), reach)) * len(samples)
    observed = np.bincount(samples + reach, minlength=2 * reach + 1).astype(np.float64)
    edges = _edges(expected)
    cells = np.add.reduceat(observed, edges), np.add.reduceat(expected, edges)
    if len(edges) == 1:
        return 1.0
    return float(chisquare(cells[0], cells[1] * cells[0].sum() / cells[1].sum()).pvalue)


def _edges(expected: npt.NDArray[np.float64]) -> list[int]:
    """Where cells begin that each expect enough, from the left; what is left over on the right joins the last."""
    right = np.cumsum(expected[::-1])[::-1]
    edges, weight = [0], 0.0
    for at, each in enumerate(expected):
        if weight >= _LEAST_EXPECTED and right[at] >= _LEAST_EXPECTED:
            edges.append(at)
            weight = 0.0
        weight += each
    return edges


def serial_p_value(samples: Samples) -> float:
    """P-value of each sample being independent of the next, by chi-square tests on classes of about equal weight.

    Args:
        samples: values in the order in which they were drawn.
    """
    cuts = np.unique(np.quantile(samples, np.linspace(0, 1, _CLASSES + 1)[1:-1]))
    classes = np.searchsorted(cuts, samples)
    return min(1.0, 2 * min(_independence(classes), _independence(classes[1:])))


def _independence(classes: npt.NDArray[np.intp]) -> float:
    from scipy.stats import chi2_contingency

    pairs = classes[: len(classes) // 2 * 2].reshape(-1, 2)
    table = np.zeros((classes.max() + 1, classes.max() + 1))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    return float(chi2_contingency(table).pvalue) if min(table.shape) > 1 else 1.0


def shared_p_value(noise: Samples, variance: Fraction) -> float:
    """Bound on the p-value of all cells having noise of their own, by how often the signs of two cells agree.

    Bernstein's inequality for each pair of cells, joined over all pairs.

    Args:
        noise: noise of several cells, one row for each release; shape [releases, cells].
        variance: parameter sigma² of the noise.
    """
    releases, cells = noise.shape
    signs = np.sign(noise).astype(np.float64)
    agreement = np.abs(signs.T @ signs)
    np.fill_diagonal(agreement, 0.0)
    most = float(agreement.max())
    spread = releases * (1 - _collision(variance)[1]) ** 2
    exponent = most**2 / 2 / (spread + most / 3)
    return min(1.0, float(cells * (cells - 1)) * math.exp(-exponent))


def repeated_p_value(noise: Samples, variance: Fraction) -> float:
    """Bound on the p-value of no two releases having the same noise, or its negative; 1 where none have.

    Args:
        noise: noise of several cells, one row for each release; shape [releases, cells].
        variance: parameter sigma² of the noise.
    """
    first = np.take_along_axis(noise, (noise != 0).argmax(axis=1)[:, None], axis=1)
    upright = np.ascontiguousarray(noise * np.where(first < 0, -1, 1))
    if len({row.tobytes() for row in upright}) == len(noise):
        return 1.0
    releases, cells = noise.shape
    by_chance = cells * math.log(_collision(variance)[0])
    return min(1.0, float(releases) ** 2 * math.exp(by_chance))


def _collision(variance: Fraction) -> tuple[float, float]:
    """Returns the probability that two samples are equal, and that one is zero."""
    masses = np.array(probabilities(float(variance), tail(variance)))
    return float(masses @ masses), float(masses[len(masses) // 2])
