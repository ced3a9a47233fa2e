"""The demo's users: who asks which agent for what, and when an answer pleases. No IO, and a seed decides everything."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ZIPF = 2.0
"""How unequally topics are liked: the k-th favourite of a site is asked for in proportion to k to minus this."""
LOYALTY = 0.6
"""Share of a user's requests that are about the user's own favourite topic."""
REQUESTS = 4
"""Requests of each user."""
PROMPT_CHARS = 160
"""Length of the beginning of a document that a user asks to have continued."""
_SITES = ((0, 1, 2, 3), (1, 0, 3, 2), (0, 2, 1, 4))


@dataclass(frozen=True)
class Ask:
    """One request: the beginning of a document that nobody in the cloud has seen, and how it really goes on."""

    topic: str
    prompt: str
    rest: str


@dataclass(frozen=True)
class User:
    """One user of one agent."""

    key: str
    asks: tuple[Ask, ...]


def crowd(asked: Mapping[str, Sequence[str]], *, agents: int, users: int, seed: int) -> list[list[User]]:
    """Invents the users of each agent.

    Sites differ in what they like, and their favourites overlap, so that the fleet as a whole has favourites too.

    Args:
        asked: Documents by topic that users may ask for.
        agents: Number of agents.
        users: Users of each.
        seed: Decides everything.
    """
    rng = np.random.default_rng([seed, 17])
    fleet = [str(topic) for topic in rng.permutation(sorted(asked))]
    sites = []
    for agent in range(agents):
        head = _SITES[agent % len(_SITES)]
        tail = rng.permutation([index for index in range(len(fleet)) if index not in head])
        liked = [fleet[index] for index in [*head, *tail]]
        shares = np.arange(1, len(liked) + 1, dtype=np.float64) ** -ZIPF
        sites.append([_user(f"user-{agent}-{n}", liked, shares / shares.sum(), asked, rng) for n in range(users)])
    return sites


def _user(
    key: str, liked: list[str], shares: "np.ndarray", asked: Mapping[str, Sequence[str]], rng: np.random.Generator
) -> User:
    own = str(rng.choice(liked, p=shares))
    topics = [own if rng.random() < LOYALTY else str(rng.choice(liked, p=shares)) for _ in range(REQUESTS)]
    return User(key, tuple(_ask(topic, str(rng.choice(list(asked[topic])))) for topic in topics))


def _ask(topic: str, text: str) -> Ask:
    """Cuts a document after a whole word."""
    cut = text[:PROMPT_CHARS].rstrip().rfind(" ") if len(text) > 2 * PROMPT_CHARS else len(text) // 2
    cut = text.rfind(" ", 0, max(cut, 8) + 1)
    cut = cut if cut > 0 else len(text) // 2
    return Ask(topic, text[:cut], text[cut:])


def pleases(answer: str, rest: str) -> bool:
    """Whether a user takes an answer: at least half of its first words are words of what really follows."""
    words = _words(answer)[:8]
    wanted = set(_words(rest)[:40])
    return bool(words) and sum(word in wanted for word in words) * 2 >= len(words)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z_]+", text.lower())


def demand(sites: Iterable[Iterable[User]]) -> dict[str, float]:
    """What the fleet really asks for: share of the requests by topic. Known to the demo alone, never to the cloud."""
    counts = Counter(ask.topic for users in sites for user in users for ask in user.asks)
    total = counts.total()
    return {topic: count / total for topic, count in sorted(counts.items())}


Outcome = Literal["accepted", "rejected"]


def outcome(answer: str, ask: Ask) -> Outcome:
    """What the user tells the agent about an answer."""
    return "accepted" if pleases(answer, ask.rest) else "rejected"
