"""A fleet's users and what they ask. Some domains are asked about far more than others, and so are some intents."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from private_feedback.requests import Requests

USERS = 20
"""Of each agent."""
ROUNDS = 4
"""That share a window's budget."""


def zipf(rng: np.random.Generator, count: int, exponent: float = 1.0) -> npt.NDArray[np.float64]:
    """Shares that fall with the rank, in random order."""
    shares: npt.NDArray[np.float64] = 1 / np.arange(1, count + 1) ** exponent
    return rng.permutation(shares / shares.sum())


@dataclass(frozen=True)
class Fleet:
    """What one fleet asks.

    Attributes:
        demand_I: share of each intent in what its users ask, in the order of `Requests.intents`.
        votes: for each round of a window and each agent, the request that each of the agent's users votes with, by
            place in `Requests.asked`.
        typed: for each user, more requests.
    """

    demand_I: npt.NDArray[np.float64]
    votes: list[list[list[int]]]
    typed: list[list[int]]

    @classmethod
    def draw(cls, requests: Requests, agents: int, seed: int, typed: int = 0) -> "Fleet":
        """Draws users by domain with replacement, and requests of each.

        Agents let each user vote with one of the user's requests at random; drawing that one alone is the same.

        Args:
            requests: to draw from.
            agents: of the fleet.
            seed: of every choice.
            typed: how many requests to draw of each user, besides the one to vote with.
        """
        rng = np.random.default_rng([seed, agents])
        intents, domains = requests.intents, requests.domains
        within = np.zeros((len(domains), len(intents)))
        taste = np.random.default_rng(seed)
        popular = zipf(taste, len(domains))
        for row, members in zip(within, domains.values(), strict=True):
            row[[intents.index(intent) for intent in members]] = zipf(taste, len(members))
        domain_of_user = rng.choice(len(domains), agents * USERS, p=popular)
        demand_I = np.bincount(domain_of_user, minlength=len(domains)) @ within / len(domain_of_user)
        first = _choose(requests, within, domain_of_user, rng)
        texts = [_choose(requests, within, domain_of_user, rng) for _ in range(typed)]
        later = [_choose(requests, within, domain_of_user, rng) for _ in range(ROUNDS - 1)]
        by_agent = [
            [votes[begin : begin + USERS] for begin in range(0, len(votes), USERS)] for votes in (first, *later)
        ]
        return cls(demand_I, by_agent, [list(each) for each in zip(*texts, strict=True)])


def _choose(
    requests: Requests,
    within: npt.NDArray[np.float64],
    domain_of_user: Sequence[int] | npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> list[int]:
    """For each user a request of the user's domain."""
    intents = requests.intents
    place = {intent: at for at, intent in enumerate(intents)}
    intent_of_asked = np.array([place[request.intent] for request in requests.asked])
    members = [np.flatnonzero(intent_of_asked == at) for at in range(len(intents))]
    edges = within.cumsum(axis=1)
    drawn = rng.random(len(domain_of_user))
    asked = [
        min(int(np.searchsorted(edges[domain], at)), len(intents) - 1)
        for domain, at in zip(domain_of_user, drawn, strict=True)
    ]
    return [int(rng.choice(members[intent])) for intent in asked]
