"""What a share of hostile agents can do to a round: honest batches by the code that ships, hostile ones by hand.

Run by `make bench NAME=poisoning`; ARGS="--agents 100 --seeds 3" makes it short. Hostile agents know everything: their
null bins hold correct noise, and their values lie within what the plan's checks let through.
"""

import argparse
import datetime as dt
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from securesystemslib.signer import CryptoSigner

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.cloud.feedback import nulls
from ebbflow.cloud.feedback.aggregate import aggregate, estimate
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.cloud.feedback.suspects import REFUSED_ROUNDS
from ebbflow.common.errors import EbbflowError
from ebbflow.common.privacy.calibration import complete_policy, variance_of
from ebbflow.common.privacy.checks import Refusal, check_batch
from ebbflow.common.privacy.gaussian import SAMPLER, DiscreteGaussian
from ebbflow.common.privacy.release import privatise
from ebbflow.common.privacy.vector import Contribution, value_limits

SHARES = (0.0, 0.01, 0.05, 0.10, 0.20)
FAILED = 0.15
"""Share of honest votes whose answer failed."""
RAW = 10**6
"""What a hostile agent would send if nothing were checked."""
SAVED = {"sigma/2": Fraction(4), "sigma/1.41": Fraction(2), "sigma/1.2": Fraction(36, 25), "correct": Fraction(1)}

Rows = npt.NDArray[np.int64]
Attack = Callable[["Fleet", Rows], None]


@dataclass(frozen=True)
class Fleet:
    """An honest fleet's batches, and what a hostile agent needs to know."""

    plan: pb.RoundPlan
    reports: Rows
    truth: Rows
    """The same without noise."""

    @property
    def bins(self) -> int:
        """How many."""
        return len(self.plan.bins)

    @property
    def target(self) -> int:
        """The bin that hostile agents push: one that few ask for."""
        return self.bins - 1


def make(agents: int, users: int, bins: int, epsilon: float, seed: int) -> Fleet:
    """A fleet whose agents each have topics of their own, around a few that many ask for."""
    rng = np.random.default_rng(seed)
    plan = _plan(bins, epsilon)
    popular = 1 / np.arange(1, bins + 1)
    reports, truth = [], []
    for _ in range(agents):
        asked = rng.choice(bins, users, p=rng.dirichlet(8 * popular / popular.sum() + 1e-3))
        failed = rng.random(users) < FAILED
        votes = [Contribution(int(bin_), bool(bad)) for bin_, bad in zip(asked, failed, strict=True)]
        reports.append(privatise(plan, votes))
        counts = np.zeros(2 * bins, np.int64)
        np.add.at(counts, asked + bins * failed, 1)
        truth.append(counts)
    return Fleet(plan, np.array(reports, np.int64), np.array(truth))


def _plan(bins: int, epsilon: float) -> pb.RoundPlan:
    policy = complete_policy(pb.PrivacyPolicy(epsilon=epsilon))
    document = pb.PolicyDocument(student="students/faq", version=1, policy=policy)
    signed = PlanSigner(CryptoSigner.generate_ed25519()).sign_policy(document)
    timing = Timing(dt.datetime(2026, 11, 3, tzinfo=dt.UTC), dt.timedelta(days=1), dt.timedelta(days=7))
    return make_plan("r1", "faq", signed, [pb.Bin(bin_id=f"{at}", texts=["x"]) for at in range(bins)], timing)


def push_target(fleet: Fleet, rows: Rows) -> None:
    """As many failed votes for one bin as a batch can hold."""
    rows[:, fleet.bins + fleet.target] = value_limits(fleet.plan)[1][0]


def push_down(fleet: Fleet, rows: Rows) -> None:
    """As few votes as a batch can hold for the bin that most ask for, and as many for the target."""
    least, most = value_limits(fleet.plan)
    rows[:, [0, fleet.bins]] = least[0]
    rows[:, [fleet.target, fleet.bins + fleet.target]] = most[0]


def flip(fleet: Fleet, rows: Rows) -> None:
    """Each vote's outcome turned round, and every count a hundred times as large."""
    seen, failed = rows[:, : fleet.bins].copy(), rows[:, fleet.bins : 2 * fleet.bins].copy()
    least, most = value_limits(fleet.plan)
    rows[:, : fleet.bins] = np.clip(100 * failed, least[0], most[0])
    rows[:, fleet.bins : 2 * fleet.bins] = np.clip(100 * seen, least[0], most[0])


def flip_quietly(fleet: Fleet, rows: Rows) -> None:
    """Each vote's outcome turned round, and nothing else: no batch looks odd."""
    rows[:, : 2 * fleet.bins] = np.roll(rows[:, : 2 * fleet.bins], fleet.bins, axis=1)


ATTACKS: dict[str, Attack] = {
    "targeted bin": push_target,
    "targeted bin, top bin down": push_down,
    "flipped outcomes, loud": flip,
    "flipped outcomes, quiet": flip_quietly,
}


@dataclass(frozen=True)
class Harm:
    """What an attack has done to a round."""

    target: float
    """Share of the targeted bin in the next mixture."""
    distance: float
    """L1 distance of the mixture from that of the honest fleet's true votes, between 0 and 2."""
    failed: float
    """Share of failed votes, as estimated."""


def judge(fleet: Fleet, result: round_pb2.Aggregate) -> Harm:
    """Compares a round with the truth."""
    sums = fleet.truth.sum(axis=0).astype(float).tolist()
    wanted, found = (
        {bin_.bin_id: bin_.weight for bin_ in each.bins} for each in (estimate(fleet.plan, sums, [], 0), result)
    )
    failed = math.fsum(bin_.failed for bin_ in result.bins)
    everything = failed + math.fsum(bin_.seen for bin_ in result.bins)
    return Harm(
        target=found[str(fleet.target)],
        distance=math.fsum(abs(found[name] - wanted[name]) for name in wanted),
        failed=min(1.0, max(0.0, failed / everything)) if everything > 0 else 0.0,
    )


def unlimited(fleet: Fleet, rows: Rows) -> round_pb2.Aggregate:
    """Adds batches up as they are."""
    return estimate(fleet.plan, rows[:, : 2 * fleet.bins].sum(axis=0).astype(float).tolist(), [], len(rows))


def measure(fleet: Fleet, attack: Attack, share: float) -> dict[str, Harm]:
    """One attack by a share of the agents: nothing checked, values checked, and influence limited too."""
    hostile = round(share * len(fleet.reports))
    rows = fleet.reports.copy()
    attack(fleet, rows[:hostile])
    unchecked = rows.copy()
    changed = unchecked[:hostile, : 2 * fleet.bins] > value_limits(fleet.plan)[1][0] - 1
    unchecked[:hostile, : 2 * fleet.bins][changed] = RAW
    passed = [row for row in rows if _passes(fleet.plan, row)]
    return {
        "nothing": judge(fleet, unlimited(fleet, unchecked)),
        "checks": judge(fleet, unlimited(fleet, np.array(passed))),
        "checks and limits": judge(fleet, aggregate(fleet.plan, [row.tolist() for row in passed])),
    }


def _passes(plan: pb.RoundPlan, row: Rows) -> bool:
    batch = pb.FeedbackBatch(mechanism=plan.mechanism, sampler=SAMPLER, noisy=row.tolist())
    try:
        check_batch(plan, b"", batch)
    except EbbflowError as error:
        if error.metadata["why"] not in {Refusal.VALUE_RANGE, Refusal.NO_NEGATIVES}:
            raise
        return False
    return not nulls.is_under_noised(row[-plan.null_bins :].tolist(), variance_of(plan.mechanism))


def caught(variance: Fraction, saved: Fraction, batches: int, runs: int) -> tuple[float, float]:
    """How often null bins show saved noise: in one batch, and in several together."""
    sampler = DiscreteGaussian(variance / saved)
    alone, together = 0, 0
    for _ in range(runs):
        tally, refused = nulls.Tally(), 0
        for _ in range(batches):
            cells = sampler.sample(64)
            if nulls.is_under_noised(cells, variance):
                refused += 1
            else:
                tally.add(cells)
        alone += refused
        together += refused >= REFUSED_ROUNDS or nulls.is_too_small(tally, variance)
    return alone / (runs * batches), together / runs


def _mean(harms: Iterable[Harm]) -> Harm:
    found = list(harms)
    return Harm(
        statistics.fmean(harm.target for harm in found),
        statistics.fmean(harm.distance for harm in found),
        statistics.fmean(harm.failed for harm in found),
    )


def _table(fleets: Sequence[Fleet]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    print("| attack | hostile agents | defence | target's share | L1 to the truth | failed votes |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for name, attack in ATTACKS.items():
        for share in SHARES:
            runs = [measure(fleet, attack, share) for fleet in fleets]
            for defence in runs[0]:
                harm = _mean(run[defence] for run in runs)
                row = f"{harm.target:.1%} | {harm.distance:.2f} | {harm.failed:.1%}"
                print(f"| {name} | {share:.0%} | {defence} | {row} |")
                figures[f"{name}/{share:g}/{defence}"] = vars(harm)
    return figures


def _table_of_nulls(variance: Fraction, runs: int) -> dict[str, tuple[float, float]]:
    print("\n| noise | caught in one batch | caught in 15 |\n| --- | ---: | ---: |")
    found = {}
    for name, saved in SAVED.items():
        found[name] = caught(variance, saved, 15, runs)
        print(f"| {name} | {found[name][0]:.1%} | {found[name][1]:.1%} |")
    return found


def main() -> None:
    """Measures, prints two tables and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--bins", type=int, default=30)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    seeds = range(options.seeds)
    fleets = [make(options.agents, options.users, options.bins, options.epsilon, seed) for seed in seeds]
    honest = [aggregate(fleet.plan, fleet.reports.tolist()).limited_batches for fleet in fleets]
    print(f"{options.agents} agents of {options.users} users, {options.bins} bins, epsilon {options.epsilon:g}")
    print(f"honest batches that the limits touch: {statistics.fmean(honest) / options.agents:.3%}\n")
    figures = _table(fleets)
    found = _table_of_nulls(variance_of(fleets[0].plan.mechanism), 40 * options.seeds)
    metrics = {
        "target_share_honest": figures["targeted bin/0/checks and limits"]["target"],
        "target_share_10pct_checks": figures["targeted bin/0.1/checks"]["target"],
        "target_share_10pct_limits": figures["targeted bin/0.1/checks and limits"]["target"],
        "l1_10pct_checks": figures["targeted bin/0.1/checks"]["distance"],
        "l1_10pct_limits": figures["targeted bin/0.1/checks and limits"]["distance"],
        "honest_limited_share": statistics.fmean(honest) / options.agents,
        "half_sigma_caught_in_one_batch": found["sigma/2"][0],
        "sigma_over_1_2_caught_in_15": found["sigma/1.2"][1],
    }
    print()
    print(json.dumps({"benchmark": "poisoning", "settings": vars(options), "metrics": metrics, "rows": figures}))


if __name__ == "__main__":
    main()
