"""The users at work: each asks its agent over HTTP, as any program would, and says what it made of the answer."""

import json
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from demo.sizes import ANSWER_TOKENS, STUDENT
from demo.users import Ask, Outcome, User, outcome

AT_A_TIME = 8
"""Users of one agent who wait for an answer at the same time; no more than the agent answers at once."""
TIMEOUT_S = 60.0


@dataclass
class Tally:
    """What came of some requests."""

    accepted: dict[str, int] = field(default_factory=dict)
    """Answers that were taken, by topic."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Answers that were turned down, by topic."""

    def add(self, topic: str, result: Outcome) -> None:
        """Counts one answer."""
        counts = self.accepted if result == "accepted" else self.rejected
        counts[topic] = counts.get(topic, 0) + 1

    @property
    def requests(self) -> int:
        """Number of answers."""
        return sum(self.accepted.values()) + sum(self.rejected.values())

    @property
    def accepted_share(self) -> float:
        """Share of the answers that were taken."""
        return sum(self.accepted.values()) / max(1, self.requests)


def work(endpoints: Sequence[str], sites: Sequence[Sequence[User]]) -> Tally:
    """Lets all users of all agents send all their requests.

    Args:
        endpoints: Base URL of each agent's API, such as "http://127.0.0.1:8080/v1".
        sites: Users of each agent.

    Raises:
        OSError: An agent did not answer, or answered with an error.
    """
    tally = Tally()
    # User by user across the agents, so that all agents are busy from the first moment to the last.
    turns = [turn for users in zip(*sites, strict=True) for turn in zip(endpoints, users, strict=True)]
    with ThreadPoolExecutor(AT_A_TIME * len(endpoints)) as pool:
        for results in pool.map(lambda turn: _visit(*turn), turns):
            for ask, result in results:
                tally.add(ask.topic, result)
    return tally


def _visit(url: str, user: User) -> list[tuple[Ask, Outcome]]:
    """One user's requests, one after the other."""
    results: list[tuple[Ask, Outcome]] = []
    for ask in user.asks:
        body = {"model": STUDENT, "prompt": ask.prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "user": user.key}
        answer = post(f"{url}/completions", body)
        result = outcome(answer["choices"][0]["text"], ask)
        post(f"{url}/feedback", {"id": answer["id"], "outcome": result})
        results.append((ask, result))
    return results


def post(url: str, body: Mapping[str, object]) -> Any:
    """Sends JSON and returns JSON."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - always http:// on this host
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
        return json.load(response)
