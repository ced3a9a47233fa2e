"""`ebbflow privacy audit`: runs the release code of the feedback channels many times and looks for leaks."""

import sys
from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ebbflow.cli.options import Output, example
from ebbflow.cli.output import Format, print_json, say, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ebbflow.common.privacy.audit.examine import Finding

RUNS = 50_000
LEAST_RUNS = 1000
EXIT_LEAK = 1


class Mechanism(Enum):
    """What can be audited."""

    VOTES = "votes"
    METRICS = "metrics"
    ADAPTERS = "adapters"
    SAMPLER = "sampler"


Mechanisms = Annotated[
    list[Mechanism] | None, typer.Option("--mechanism", help="Only this; may be repeated.  [default: all]")
]
Policies = Annotated[
    list[float] | None,
    typer.Option("--policy", help="Epsilon of a window to audit under; may be repeated.  [default: 4]"),
]
Runs = Annotated[int, typer.Option(min=LEAST_RUNS, help="Runs with the user and without, each.")]
Delta = Annotated[float, typer.Option(help="Delta of the policies.")]
Rounds = Annotated[int, typer.Option("--rounds-per-window", min=1, help="Rounds of a window.")]

EPILOG = example("ebbflow privacy audit", "ebbflow privacy audit --mechanism votes --policy 1 --policy 8 -o json")


def audit(
    mechanism: Mechanisms = None,
    policy: Policies = None,
    runs: Runs = RUNS,
    delta: Delta = 1e-6,
    rounds_per_window: Rounds = 4,
    output: Output = Format.TABLE,
) -> None:
    """Audits the code that adds noise, on this computer and with made-up users; it asks neither cloud nor agents.

    Each mechanism runs many times with and without one user who pushes as hard as the code lets anyone. A test fails if
    the runs tell the two apart better than the policy allows, or if the noise is not what it should be; a correct build
    fails a test once in a million. To pass says that no leak was found along this user with so many runs.

    Exit code 1: a test failed. Takes about a minute for each policy with the default number of runs.
    """
    chosen = mechanism or list(Mechanism)
    rows: list[tuple[float, Finding]] = []
    for epsilon in policy or [4.0]:
        for each in chosen:
            rows += [(epsilon, finding) for finding in _findings(each, epsilon, delta, rounds_per_window, runs)]
    if output is Format.JSON:
        print_json([{"epsilon": epsilon, **asdict(finding)} for epsilon, finding in rows])
    else:
        for line in _lines(rows):
            print(line)
    leaks = sum(finding.failed for _, finding in rows)
    if leaks:
        say(f"{leaks} of {len(rows)} tests FAILED: this build does not keep what its policies promise")
        raise typer.Exit(EXIT_LEAK)
    say(f"{len(rows)} tests passed: no leak was found")


def _findings(
    mechanism: Mechanism, epsilon: float, delta: float, rounds_per_window: int, runs: int
) -> "Iterator[Finding]":
    from ebbflow.api.v1.feedback_pb2 import PrivacyPolicy
    from ebbflow.common.errors import EbbflowError, Reason

    try:
        from ebbflow.common.privacy.audit.examine import examine, examine_sampler
        from ebbflow.common.privacy.audit.subjects import SUBJECTS
    except ImportError as error:
        message = f"{error.name} is not installed: pip install 'ebbflow[cloud]'"
        raise EbbflowError(Reason.EXTRA_MISSING, message) from None

    asked = PrivacyPolicy(epsilon=epsilon, delta=delta, rounds_per_window=rounds_per_window)
    if mechanism is Mechanism.SAMPLER:
        yield from examine_sampler(SUBJECTS["votes"](asked).plan, 4 * runs)
    else:
        progress = _progress(f"{mechanism.value} at epsilon {epsilon:g}", 2 * runs)
        yield from examine(SUBJECTS[mechanism.value](asked), runs, progress=progress)


def _progress(what: str, whole: int) -> "Callable[[int], None]":
    """Says on a terminal how far a mechanism has come, on one line; elsewhere nothing."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        if sys.stderr.isatty():
            end = "\r" if done < whole else "\n"
            print(f"{what}: {100 * done // whole:3d} %", end=end, file=sys.stderr, flush=True)

    return more


def _lines(rows: "list[tuple[float, Finding]]") -> list[str]:
    heads = ["MECHANISM", "EPSILON", "TEST", "RUNS", "MEASURED", "CLAIM", "RESULT"]
    cells = [
        [
            finding.mechanism,
            f"{epsilon:g}",
            finding.test,
            str(finding.runs),
            f"{finding.measured:.4g}",
            f"{finding.relation} {finding.claimed:.4g}",
            "FAIL" if finding.failed else "pass",
        ]
        for epsilon, finding in rows
    ]
    return table(heads, cells)
