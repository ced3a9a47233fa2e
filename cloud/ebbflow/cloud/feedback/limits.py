"""The largest influence that one agent may have on a round.

Noise hides what an agent says, so nobody can tell a lie from a rare truth. What can be told is how many users agents
have, and how many of them ask for the same: no agent counts for more than a few times what the fuller part of the fleet
says, in each cell, in all of them together and against other agents' votes. What an honest agent of such a fleet sends
lies within these limits but once in some thousand batches. Where few agents have most of the users, theirs are cut: a
site that large and a liar look alike. `limited_batches` tells the operator.

The limits are learnt from the batches themselves, by a quantile that a fifth of hostile agents cannot move far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST_AGENTS = 5
"""Below it a quantile is whatever a single agent says."""
FULL = 0.75
"""Share of the fleet below the agent that counts as well used: a quarter of it may lie without being that agent."""
LEEWAY = 3.0
"""An agent may have this many times the users of the well used one."""
CELL_LEEWAY = 2.5
"""An agent's largest cell may hold this many times what that of the well used one holds, noise included."""
CELL_SIGMAS = 5.0
"""Deviations of noise that a cell may always show: one honest cell in four million shows more."""
SUM_SIGMAS = 4.0
"""The same for sums over all cells, of which a batch has two."""
_DEVIATIONS_AT_FULL = 0.674490
"""Standard normal quantile at FULL."""
_QUANTILE_ERROR = 1.36
"""Standard error of that quantile of normal samples, in deviations over the root of their number."""

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """What one agent may say at most."""

    users: float
    """Users that one agent is believed to have at most."""
    cell: float
    """Largest value of a cell."""
    sigma: float
    """Standard deviation of the noise on each cell."""

    def apply(self, votes_AC: _Array, metrics_AM: _Array, caps_M: _Array) -> int:
        """Cuts batches to the limits, in place; returns how many were cut.

        Args:
            votes_AC: noisy votes by agent and cell, seen and failed.
            metrics_AM: noisy metrics.
            caps_M: what one user adds to each metric at most.
        """
        reach = CELL_SIGMAS * self.sigma
        cut_AC = np.clip(votes_AC, -reach, self.cell)
        cut_AC *= self._shrink(cut_AC)[:, None]
        cut_AM = np.clip(metrics_AM, -reach, self.users * caps_M + reach)
        changed_A = (cut_AC != votes_AC).any(axis=1) | (cut_AM != metrics_AM).any(axis=1)
        votes_AC[:], metrics_AM[:] = cut_AC, cut_AM
        return int(changed_A.sum())

    def _shrink(self, votes_AC: _Array) -> _Array:
        """Factors by which batches shrink whose votes together are too many, too few, or too far from nothing."""
        cells = votes_AC.shape[1]
        reach = SUM_SIGMAS * self.sigma * math.sqrt(cells)
        norm = self.sigma * math.sqrt(cells + SUM_SIGMAS * math.sqrt(2 * cells)) + self.users
        total_A = votes_AC.sum(axis=1)
        most_A = np.where(total_A > 0, self.users + reach, reach)
        by_total_A = most_A / np.maximum(np.abs(total_A), most_A)
        by_norm_A: _Array = norm / np.maximum(np.linalg.norm(votes_AC, axis=1), norm)
        factor_A: _Array = np.minimum(by_total_A, by_norm_A)
        return factor_A


def find(totals: Sequence[int], largest: Sequence[int], cells: int, sigma: float) -> Limits | None:
    """Learns the limits from a round's batches; None where there are too few agents to learn from.

    Args:
        totals: noisy votes of each agent, over all cells.
        largest: each agent's largest cell.
        cells: how many these are, seen and failed.
        sigma: standard deviation of the noise on each cell.
    """
    agents = len(totals)
    if agents < LEAST_AGENTS:
        return None
    noise = sigma * math.sqrt(cells)  # on an agent's total
    quantile, widest = float(np.quantile(totals, FULL)), float(np.quantile(largest, FULL))
    well_used = quantile - _DEVIATIONS_AT_FULL * noise + 2 * _QUANTILE_ERROR * noise / math.sqrt(agents)
    return Limits(
        users=LEEWAY * max(1.0, well_used),
        cell=max(CELL_LEEWAY * widest, CELL_SIGMAS * sigma),
        sigma=sigma,
    )
