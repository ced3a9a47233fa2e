"""Runs all arms: rounds here, students in processes of their own."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from private_feedback import updates
from private_feedback.fleet import ROUNDS, Fleet
from private_feedback.requests import Request, Requests
from private_feedback.rounds import Mixture, Outcome, Topics
from private_feedback.students import Nats, School, Steps

from ebbflow.common.student.model import Student

TYPED = 8
"""Texts of each user that an adapter learns from."""


@dataclass(frozen=True)
class Arm:
    """One fleet, and what its feedback goes through.

    Attributes:
        agents: of the fleet, each with its users.
        epsilon: of a window of four rounds; infinity is no noise; 0 is no feedback; -1 is the truth that no vote can
            beat.
        seed: of users, and of the order of documents.
        rounds: how many of the window's have been closed.
    """

    agents: int
    epsilon: float
    seed: int
    rounds: int = 1

    @classmethod
    def all(cls, fleets: Sequence[int], epsilons: Sequence[float], seeds: int) -> list["Arm"]:
        """Every combination."""
        alone = (0.0, *epsilons, float("inf"), -1.0)
        kinds = [(kind, 1) for kind in alone] + [(kind, ROUNDS) for kind in (*epsilons, float("inf"))]
        return [cls(agents, kind, seed, rounds) for agents in fleets for kind, rounds in kinds for seed in range(seeds)]


@dataclass(frozen=True)
class Result:
    """What came of an arm."""

    arm: Arm
    mixture: Mixture
    error: float
    """L1 distance of the mixture to that of the truth, 0 to 2."""
    informative: bool
    nats: float
    """Of the next student, per token of what the fleet will ask."""
    accuracy: float
    """Share of votes in the right bin."""


class Experiment:
    """Everything that the arms share; a context manager, for its processes.

    Attributes:
        requests: the texts.
        school: trains and measures.
        base: the student that serves.
    """

    def __init__(self, requests: Requests, steps: Steps, processes: int) -> None:
        """Trains the student that serves."""
        torch.set_num_threads(1)
        self.requests, self.school = requests, School(requests, steps)
        self.base = self.school.base()
        self._failed = self.school.failed(self.base)
        self._pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), _begin, (requests, steps, self.base)
        )

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)

    def run(self, topic_of: Callable[[Request], str], arms: Sequence[Arm]) -> list[Result]:
        """Plays every arm's round, trains its student, and measures."""
        topics = Topics.sort(self.requests, topic_of, self.school.tokenizer, self._failed)
        fleets = {
            (arm.agents, arm.seed): Fleet.draw(self.requests, arm.agents, arm.seed) for arm in arms if arm.epsilon == 0
        }
        outcomes = {arm: _play(topics, fleets[arm.agents, arm.seed], arm) for arm in arms}
        labels = [topic_of(request) for request in self.requests.public]
        lessons = {
            (arm.seed, tuple(outcomes[arm].mixture.items())) for arm in arms
        }  # no feedback is one for all fleets
        taught = {lesson: self._pool.submit(_teach, labels, dict(lesson[1]), lesson[0]) for lesson in sorted(lessons)}
        return [
            self._result(
                arm,
                outcomes[arm],
                topics,
                fleets[arm.agents, arm.seed],
                taught[arm.seed, tuple(outcomes[arm].mixture.items())].result(),
            )
            for arm in arms
        ]

    def play_adapters(self, agents: int, epsilon: float) -> updates.Found:
        """Plays one round of adapter updates of the student that serves."""
        fleet = Fleet.draw(self.requests, agents, 0, typed=TYPED)
        texts = [[self.requests.asked[place].text for place in user] for user in fleet.typed]
        return updates.play(self.school, self.base, fleet.demand_I, texts, epsilon)

    def _result(self, arm: Arm, outcome: Outcome, topics: Topics, fleet: Fleet, nats: Nats) -> Result:
        truth = topics.oracle(fleet).mixture
        return Result(
            arm=arm,
            mixture=outcome.mixture,
            error=sum(abs(outcome.mixture[topic] - share) for topic, share in truth.items()),
            informative=outcome.informative,
            nats=self.school.nats_per_token(nats, fleet.demand_I),
            accuracy=topics.accuracy,
        )


def _play(topics: Topics, fleet: Fleet, arm: Arm) -> Outcome:
    if arm.epsilon == 0:
        return topics.even()
    if arm.epsilon < 0:
        return topics.oracle(fleet)
    if arm.epsilon == float("inf"):
        return topics.unprotected(fleet, arm.rounds)
    return topics.private(fleet, arm.epsilon, arm.rounds)


_school: School
_base: Student


def _begin(requests: Requests, steps: Steps, base: Student) -> None:
    global _school, _base  # what every task of a process shares
    torch.set_num_threads(1)
    _school, _base = School(requests, steps), base


def _teach(labels: list[str], mixture: Mixture, seed: int) -> Nats:
    return _school.following(_base, labels, mixture, seed)
