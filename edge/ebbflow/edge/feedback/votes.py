"""Which one vote each user has, and for which bin. No disk, no network, and no user's vote depends on another user."""

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback.interactions import Interaction

Embed = Callable[[Sequence[str]], npt.NDArray[np.floating]]
"""Turns texts into vectors, one row for each: zeros or what is not finite for a text that says nothing.

It must depend on the text alone; it raises where it cannot say, and then there is no report.
"""

FAILED = frozenset({rpb.OUTCOME_EDITED, rpb.OUTCOME_REJECTED, rpb.OUTCOME_REGENERATED})


def by_user(interactions: Iterable[Interaction]) -> dict[bytes, list[Interaction]]:
    """Groups interactions by their user."""
    users: dict[bytes, list[Interaction]] = defaultdict(list)
    for interaction in interactions:
        users[interaction.user].append(interaction)
    return dict(users)


def pick_one(interactions: Sequence[Interaction]) -> Interaction:
    """Picks a user's one vote, uniformly, by the operating system's randomness."""
    return secrets.choice(interactions)


def count_metrics(
    metrics: Iterable[pb.Metric], interactions: Sequence[Interaction], *, near: bool = False
) -> tuple[int, ...]:
    """Counts what a user did, for each metric of the plan; clipped later, where users are added up.

    Args:
        metrics: what the plan counts.
        interactions: all of the user's in the plan's window.
        near: whether the user's vote is near its bin.
    """
    failed = sum(interaction.outcome in FAILED for interaction in interactions)
    accepted = sum(interaction.outcome == rpb.OUTCOME_ACCEPTED for interaction in interactions)
    amounts = {pb.Metric.KIND_ACCEPTED: accepted, pb.Metric.KIND_FAILED: failed, pb.Metric.KIND_NEAR: int(near)}
    return tuple(amounts[metric.kind] for metric in metrics)


@dataclass(frozen=True)
class Nearest:
    """The bin that a text goes to."""

    bin: int
    cosine: float
    """Between the text and the bin, as directions from the mean of all bins."""


class Bins:
    """The plan's bins as directions, around the mean of the bins themselves.

    The mean is that of the bins' public texts and never of the users' texts: otherwise one user would move the others'
    votes, and the bound on one user's influence would be gone.
    """

    def __init__(self, bins: Sequence[pb.Bin], embed: Embed) -> None:
        """Embeds every bin as the mean of its texts."""
        rows_KE = np.stack([np.asarray(embed(list(bin_.texts)), np.float64).mean(axis=0) for bin_ in bins])
        self._embed = embed
        self._centre_E = rows_KE.mean(axis=0)
        self._directions_KE = _unit(rows_KE - self._centre_E)

    def nearest(self, text: str) -> int | None:
        """Returns the number of the text's bin, as `find` does."""
        found = self.find(text)
        return found.bin if found else None

    def find(self, text: str) -> Nearest | None:
        """Returns the bin of the largest cosine, or none where the text's embedding says nothing or is not finite.

        Each text is embedded on its own, so that what else is in a batch cannot change its last bits. What `embed`
        raises goes on: a vote that is left out because the device is busy would be another user's doing.
        """
        row_E = np.asarray(self._embed([text]), np.float64)[0]
        if not (np.isfinite(row_E).all() and row_E.any()):
            return None
        cosines_K = self._directions_KE @ _unit(row_E - self._centre_E)
        best = int(np.argmax(cosines_K))
        return Nearest(best, float(cosines_K[best]))


def _unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: npt.NDArray[np.float64] = rows / np.where(length > 0, length, 1.0)
    return unit


def contributions_of(
    plan: pb.RoundPlan,
    users: dict[bytes, list[Interaction]],
    prompts_of: Callable[[Sequence[str]], dict[str, str]],
    embed: Embed,
) -> list[Contribution]:
    """Returns at most one contribution for each user.

    Args:
        plan: an admitted plan.
        users: interactions of the plan's window by user.
        prompts_of: returns prompts by the ids of their interactions.
        embed: the plan's measure of likeness.
    """
    chosen = {user: pick_one(interactions) for user, interactions in users.items()}
    prompts = prompts_of([interaction.id for interaction in chosen.values()])
    bins = Bins(plan.bins, embed)
    found = []
    for user, interaction in chosen.items():
        nearest = bins.find(prompts[interaction.id]) if interaction.id in prompts else None
        if nearest is not None:
            near = nearest.cosine * 1_000_000 >= plan.near_micro
            metrics = count_metrics(plan.metrics, users[user], near=near)
            made_of = frozenset(each.id for each in users[user])
            found.append(Contribution(nearest.bin, interaction.outcome in FAILED, metrics, made_of))
    return found
