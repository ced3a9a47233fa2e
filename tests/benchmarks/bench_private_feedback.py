"""What private feedback is worth: fleets of 1 to 10,000 agents, real texts, real noise, students that learn from it.

Run by `make bench NAME=private-feedback ARGS="--data clinc150"`; `--quick` is done in three minutes. The next student
is trained on the mixture that a round gives, and measured on what the fleet's users ask: with noise for several
epsilon, with the same votes without noise, and without feedback. `--write` updates chart and figures in the
documentation.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

sys.path.insert(0, str(Path(__file__).resolve().parent))

from private_feedback import chart, device, page, report
from private_feedback.experiment import Arm, Experiment, Result
from private_feedback.requests import Request, load
from private_feedback.students import Steps

FLEETS = (1, 10, 100, 1_000, 10_000)
EPSILONS = (1.0, 2.0, 4.0, 8.0)
ADAPTER_FLEETS = (3, 10, 100)
ADAPTER_EPSILON = 4.0
SEEDS = 3
DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "explanation"
TOPICS: dict[str, Callable[[Request], str]] = {
    "150 topics": lambda request: request.intent,
    "10 topics": lambda request: request.domain,
}


def main() -> None:
    """Prints the tables and, on the last line, one JSON object."""
    asked = _arguments()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    begin_s = time.perf_counter()
    fleets = [agents for agents in FLEETS if agents <= asked.agents]
    steps = Steps(asked.steps * 2, asked.steps)
    found: dict[str, list[Result]] = {}
    with Experiment(load(asked.data), steps, asked.processes) as experiment:
        for name, topic_of in TOPICS.items():
            found[name] = experiment.run(topic_of, Arm.all(fleets, EPSILONS, asked.seeds))
            print(report.table(name, found[name]), flush=True)
        cost = device.measure(experiment.requests, experiment.school.tokenizer)
        print(report.cost(cost), flush=True)
        updates = [
            experiment.play_adapters(agents, ADAPTER_EPSILON) for agents in ADAPTER_FLEETS if agents <= asked.agents
        ]
    print(report.adapters(updates))
    print(f"took {time.perf_counter() - begin_s:.0f} s\n")
    figures = report.figures(found, cost, updates) | {"run": {"seeds": asked.seeds, "steps": asked.steps}}
    if asked.write:
        write(figures)
    print(json.dumps(figures))


def write(figures: dict[str, Any]) -> None:
    """Updates chart, figures and the page's tables in the documentation."""
    page_file = DOCUMENTATION / "what-feedback-is-worth.md"
    page_file.write_text(page.replace(page_file.read_text(), figures))
    page_file.with_suffix(".svg").write_text(chart.draw(figures))
    page_file.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CLINC150", "clinc150")))
    parser.add_argument("--quick", action="store_true", help="fleets up to 1,000 agents, one seed, shorter training")
    parser.add_argument("--agents", type=int, default=max(FLEETS), help="largest fleet")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=80, help="of each student's training")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--write", action="store_true", help="update chart and figures in docs/explanation")
    asked = parser.parse_args()
    if asked.quick:
        asked.agents, asked.seeds, asked.steps = 1_000, 1, 40
    return asked


if __name__ == "__main__":
    main()
