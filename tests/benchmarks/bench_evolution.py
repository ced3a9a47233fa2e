"""Whether prompts come nearer to what users ask, generation by generation: real votes, real noise, real texts.

Run by `make bench NAME=evolution ARGS="--data clinc150"`. Users ask with a skew that no corpus shows: of 150 intents,
shuffled by the seed, the n-th is asked in proportion to n^-1.2. The corpus knows only the ten domains. Without a
teacher: new prompts are public texts, as for a teacher that is found too weak.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent))

from private_feedback.requests import Request, Requests, load

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1.population_pb2 import Prompt, Quality
from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.likeness import by_words
from ebbflow.cloud.feedback.aggregate import aggregate
from ebbflow.cloud.feedback.evolution import Votes, crowding, quality
from ebbflow.cloud.feedback.generation import Order, first, following
from ebbflow.cloud.feedback.pool import Pool, Space, sample
from ebbflow.common.privacy.calibration import DEFAULT_DELTA, calibrate
from ebbflow.common.privacy.release import privatise
from ebbflow.edge.feedback.interactions import Interaction
from ebbflow.edge.feedback.votes import contributions_of

SKEW = 1.2
ROUNDS_PER_WINDOW = 4
HELD_OUT = 2_000
NEAR_MICRO = 300_000


@dataclass(frozen=True)
class Fleet:
    """Users who ask."""

    requests: Requests
    agents: int
    users: int
    epsilon: float
    rng: np.random.Generator
    demand: npt.NDArray[np.float64]
    """Share of each intent."""

    def draw(self, part: Sequence[Request], count: int) -> list[str]:
        """What `count` users ask."""
        by_intent: dict[str, list[str]] = {intent: [] for intent in self.requests.intents}
        for request in part:
            by_intent[request.intent].append(request.text)
        intents = self.rng.choice(self.requests.intents, count, p=self.demand)
        return [str(self.rng.choice(by_intent[intent])) for intent in intents]

    def vote(self, prompts: Sequence[Prompt]) -> Votes:
        """One round on some prompts."""
        plan = pb.RoundPlan(
            bins=[pb.Bin(bin_id=prompt.prompt_id, texts=[prompt.text]) for prompt in prompts],
            metrics=[pb.Metric(kind=pb.Metric.KIND_NEAR, cap=1)],
            mechanism=calibrate(self.epsilon, DEFAULT_DELTA, ROUNDS_PER_WINDOW, 2),
            null_bins=64,
            near_micro=NEAR_MICRO,
            max_users=1000,
        )
        likeness = by_words([prompt.text for prompt in prompts])
        asked = self.draw(self.requests.asked, self.agents * self.users)
        reports = []
        for begin in range(0, len(asked), self.users):
            texts = {str(at): text for at, text in enumerate(asked[begin : begin + self.users])}
            users = {id_.encode(): [Interaction(id_, id_.encode())] for id_ in texts}
            votes = contributions_of(plan, users, _prompts(texts), likeness)
            reports.append(privatise(plan, votes))
        return Votes.of(plan, aggregate(plan, reports))

    def distance(self, prompts: Sequence[Prompt]) -> float:
        """Half of the L1 distance between what users ask, by intent, and the prompts' shares in training texts."""
        intents = {request.text: request.intent for request in self.requests.public}
        weights = dict.fromkeys(self.requests.intents, 0.0)
        for prompt in prompts:
            weights[intents[prompt.text]] += prompt.weight
        return 0.5 * float(np.abs(np.array([*weights.values()]) - self.demand).sum())


def _prompts(texts: dict[str, str]) -> Callable[[Sequence[str]], dict[str, str]]:
    return lambda ids: {id_: texts[id_] for id_ in ids}


def evolve(requests: Requests, arguments: argparse.Namespace, seed: int) -> list[tuple[float, float]]:
    """Prints a line for each generation; returns how near each is to what users will ask, and how far by intents."""
    texts = sample([Text(request.domain, request.text, "train") for request in requests.public], seed)
    public = [text.text for text in texts]
    space = Space(by_words(public), public)
    pool = Pool(texts, space.rows(public))
    rng = np.random.default_rng(seed)
    shares_I = 1 / np.arange(1, len(requests.intents) + 1) ** SKEW
    demand_I = rng.permutation(shares_I / shares_I.sum())
    fleet = Fleet(requests, arguments.agents, arguments.users, arguments.epsilon, rng, demand_I)
    rows_HE = space.rows(fleet.draw(requests.held_out, HELD_OUT))
    prompts: Sequence[Prompt] = first(pool, Order(1, arguments.size, seed), {})
    found: list[tuple[float, float]] = []
    for number in range(1, arguments.generations + 1):
        rows_NE = space.rows([prompt.text for prompt in prompts])
        found.append((float((rows_HE @ rows_NE.T).max(axis=1).mean()), fleet.distance(prompts)))
        line = f"{seed:>4} {number:>10} {found[-1][0]:>8.3f} {found[-1][1]:>8.3f}"
        if number == arguments.generations:
            print(line, flush=True)
            break
        votes = fleet.vote(prompts)
        print(line, _said(quality(votes, crowding(rows_NE))), flush=True)
        prompts = following(pool, space, Order(number + 1, arguments.size, seed), prompts, votes, None).prompts
    return found


def _said(said: Quality) -> str:
    near = f"{said.near_share:.2f}±{said.near_error:.2f}"
    return (
        f"{said.winners:>7} {said.winners_share:>6.2f} {near:>9} {said.effective_prompts:>6.1f} {said.crowding:>8.2f}"
    )


def main() -> None:
    """Runs every seed and prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CLINC150", "clinc150")))
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    requests, begin_s = load(arguments.data), time.monotonic()
    print("seed generation nearness distance winners  share      near spread crowding")
    found = [evolve(requests, arguments, seed) for seed in range(arguments.seeds)]
    nearness, distance = (
        [statistics.fmean(run[at][which] for run in found) for at in range(arguments.generations)] for which in (0, 1)
    )
    print(" ".join(f"{mean:.3f}" for mean in nearness), "nearness, mean over seeds")
    print(" ".join(f"{mean:.3f}" for mean in distance), "distance, mean over seeds")
    ends = {"nearness": nearness, "distance": distance}
    metrics = {
        f"{name}_{end}": round(each[at], 4) for name, each in ends.items() for end, at in (("first", 0), ("last", -1))
    }
    seconds = round(time.monotonic() - begin_s, 1)
    print(
        json.dumps({"benchmark": "evolution", "metrics": metrics, "seconds": seconds, **vars(arguments)}, default=str)
    )


if __name__ == "__main__":
    main()
