"""How often the audit finds builds with a bug, and how often it fails a correct one.

Run by `make bench NAME=audit`. Each cell of the table is a number of whole audits of one build under one policy, at the
size at which `ebbflow privacy audit` works: 50,000 runs with the user and as many without. The tests stand beside each
other: scale sees noise and is blind to contributions, influence sees contributions and is blind to noise, mu sees all
that tells the two worlds apart but little of a small excess.

Votes are audited wide: in a plan of 256 bins every other bin has a user of its own, seen and failed, so that one
release of the real code is 256 independent runs. Metrics and adapter updates are audited run by run, so fewer times.

Takes about half an hour on one core.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import beta

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/broken_builds.py

from broken_builds import (
    BARE,
    FORGOTTEN,
    HALVED,
    LESS,
    NOT_COMPOSED,
    PER_BIN,
    REUSED,
    SHARED,
    SLIGHTLY_LESS,
    TWICE,
    UNCLIPPED,
    Bug,
)

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.audit import claims
from ebbflow.common.privacy.audit.bounds import ALPHA, Runs, influence_lower_bound, mu_lower_bound, scale_fails
from ebbflow.common.privacy.audit.examine import DEFAULT_RUNS, examine
from ebbflow.common.privacy.audit.sampling import Samples, fit_p_value, repeated_p_value, shared_p_value
from ebbflow.common.privacy.audit.subjects import SUBJECTS, Release, User, release, votes
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.vector import Contribution

EPSILONS = (1.0, 2.0, 4.0, 8.0)
BINS = 256
CORRECT: Bug = ("none", lambda: release)
WIDE = [CORRECT, HALVED, LESS, SLIGHTLY_LESS, UNCLIPPED, PER_BIN, TWICE, NOT_COMPOSED, REUSED, SHARED, BARE]
NARROW = {
    "metrics": [CORRECT, HALVED, UNCLIPPED, TWICE, NOT_COMPOSED, FORGOTTEN],
    "adapters": [CORRECT, HALVED, UNCLIPPED, TWICE, NOT_COMPOSED],
}
PROMISED = {bug[0] for bug in (HALVED, UNCLIPPED, NOT_COMPOSED, TWICE)}
"""Bugs for which PROMISED_POWER is promised."""
PROMISED_POWER = 0.99
TESTS = ("scale", "influence", "mu", "noise")


@dataclass
class Cell:
    """Audits of one build under one policy.

    Attributes:
        caught: audits that failed it, by test; "any" is the audit's verdict.
        tests: single tests that were made.
        cpu_s: what one audit cost.
    """

    mechanism: str
    epsilon: float
    bug: str
    runs: int
    audits: int = 0
    tests: int = 0
    cpu_s: float = 0.0
    caught: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("any", *TESTS), 0))

    def note(self, failed: dict[str, list[bool]], cpu_s: float) -> None:
        """Counts one audit."""
        self.audits += 1
        self.cpu_s += (cpu_s - self.cpu_s) / self.audits
        self.tests += sum(map(len, failed.values()))
        self.caught["any"] += any(map(any, failed.values()))
        for test, verdicts in failed.items():
            self.caught[test] += any(verdicts)

    @property
    def power(self) -> float:
        """Share of the audits that failed the build."""
        return self.caught["any"] / self.audits

    @property
    def least_power(self) -> float:
        """What the power is at least, at 95 % (Clopper and Pearson)."""
        hits = self.caught["any"]
        return float(beta.ppf(0.05, hits, self.audits - hits + 1)) if hits else 0.0


def wide_plan(epsilon: float) -> pb.RoundPlan:
    """The default plan of a policy, with as many bins as a plan may have."""
    plan = votes(pb.PrivacyPolicy(epsilon=epsilon)).plan
    del plan.bins[:]
    plan.bins.extend(pb.Bin(bin_id=str(number), texts=[str(number)]) for number in range(BINS))
    return plan


EVERYBODY: list[User] = [Contribution(at, failed) for at in range(0, BINS, 2) for failed in (False, True)]


def wide_world(plan: pb.RoundPlan, build: Release, users: Sequence[User], runs: int) -> tuple[Runs, Samples]:
    """Runs of one world along two directions, the user's bin and it with its neighbour; and all cells' noise."""
    reports = np.array([build(plan, users) for _ in range(math.ceil(runs / BINS))], np.int64)
    cells = reports[:, : 2 * BINS].reshape(-1, 2).astype(np.float64)[:runs]
    return np.stack([cells[:, 0], cells.sum(axis=1) / math.sqrt(2)]), reports


def wide_audit(plan: pb.RoundPlan, build: Release, runs: int) -> dict[str, list[bool]]:
    """One audit of votes; whether each test failed the build."""
    without, noise = wide_world(plan, build, [], runs)
    with_, _ = wide_world(plan, build, EVERYBODY, runs)
    variance, rounds = variance_of(plan.mechanism), plan.policy.rounds_per_window
    moments = claims.noise_moments(variance)
    mu, influence = [], []
    for left, right in zip(without, with_, strict=True):
        influence.append(influence_lower_bound(left, right, moments[0]) > 1)
        mu.append(mu_lower_bound(left, right) > claims.round_mu(plan))
        windows = [world.reshape(-1, rounds).sum(axis=1) / math.sqrt(rounds) for world in (left, right)]
        mu.append(mu_lower_bound(*windows) > claims.window_mu(plan))
    p_values = (
        fit_p_value(noise.ravel()[:runs], variance),
        shared_p_value(noise[:, -plan.null_bins :], variance),
        repeated_p_value(noise, variance),
    )
    return {
        "scale": [scale_fails(without[0], moments[0], kurtosis=moments[1])],
        "influence": influence,
        "mu": mu,
        "noise": [p_value < ALPHA for p_value in p_values],
    }


def narrow_audit(name: str, epsilon: float, build: Release, runs: int) -> dict[str, list[bool]]:
    """One audit as the command makes it, with few null bins to save time."""
    subject = SUBJECTS[name](pb.PrivacyPolicy(epsilon=epsilon))
    subject.plan.null_bins = 8
    failed: dict[str, list[bool]] = {test: [] for test in TESTS}
    for finding in examine(subject, runs, build):
        kind = finding.test.split(",")[0].split()[0]
        failed[kind if kind in TESTS else "noise"].append(finding.failed)
    return failed


def measure(cell: Cell, audits: int, audit: Callable[[], dict[str, list[bool]]]) -> Cell:
    """Makes the audits of one cell."""
    for _ in range(audits):
        begun = time.process_time()
        failed = audit()
        cell.note(failed, time.process_time() - begun)
    say(f"{cell.mechanism}, epsilon {cell.epsilon:g}, {cell.bug}: {cell.caught} of {cell.audits}, {cell.cpu_s:.2f} s")
    return cell


def power_table(options: argparse.Namespace) -> list[Cell]:
    """All cells; where the power is short of what is promised, the same again with four times the runs."""
    cells = []
    for epsilon in options.epsilons:
        plan = wide_plan(epsilon)
        for name, make in WIDE:
            for runs in (options.runs, 4 * options.runs):
                audit = partial(wide_audit, plan, make(), runs)
                cells.append(measure(Cell("votes", epsilon, name, runs), options.audits, audit))
                if name == CORRECT[0] or cells[-1].power >= PROMISED_POWER:
                    break
    for mechanism, bugs in NARROW.items() if options.narrow_audits else ():
        for name, make in bugs:
            audit = partial(narrow_audit, mechanism, 4.0, make(), options.runs)
            cells.append(measure(Cell(mechanism, 4.0, name, options.runs), options.narrow_audits, audit))
    return cells


def show(cells: list[Cell]) -> None:
    """Prints the table."""
    columns = ("mechanism", "epsilon", "bug", "runs", "audits", "found", "at least", *TESTS, "CPU s")
    table = Table(*columns, title="share of audits that fail a build")
    for cell in cells:
        shares = [f"{cell.caught[test] / cell.audits:.2f}" for test in TESTS]
        row = (cell.mechanism, f"{cell.epsilon:g}", cell.bug, f"{cell.runs:,}", str(cell.audits))
        table.add_row(*row, f"{cell.power:.3f}", f"{cell.least_power:.3f}", *shares, f"{cell.cpu_s:.2f}")
    Console(width=140).print(table)


def summary(cells: list[Cell], runs: int) -> dict[str, Any]:
    """What the JSON line says."""
    right = [cell for cell in cells if cell.bug == CORRECT[0]]
    promised = [cell for cell in cells if cell.bug in PROMISED and cell.runs == runs]
    return {
        "benchmark": "audit",
        "metrics": {
            "least_promised_power": min(cell.power for cell in promised),
            "promised_audits": sum(cell.audits for cell in promised),
            "false_alarms": sum(cell.caught["any"] for cell in right),
            "correct_audits": sum(cell.audits for cell in right),
            "correct_tests": sum(cell.tests for cell in right),
            "false_alarms_by_the_bound": ALPHA * sum(cell.tests for cell in right),
            "power": {
                f"{cell.mechanism}/{cell.epsilon:g}/{cell.bug}/{cell.runs}": round(cell.power, 4)
                for cell in cells
                if cell.bug != CORRECT[0]
            },
        },
    }


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=DEFAULT_RUNS, help="with the user and without, each")
    parser.add_argument("--audits", type=int, default=100, help="of each build of the votes")
    parser.add_argument(
        "--narrow-audits", type=int, default=5, help="of each build of metrics and adapters; 0 for none"
    )
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    options = parser.parse_args(arguments)
    cells = power_table(options)
    show(cells)
    print(json.dumps(summary(cells, options.runs)))


if __name__ == "__main__":
    main()
