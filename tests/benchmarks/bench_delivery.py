"""Moves a release to some agents at once: ours against Flower, NVFLARE and a bare gRPC byte stream, in one run.

Run by `make bench NAME=delivery`; ARGS="--mb 50 --agents 2 --only ours,bare" makes it short. The clock runs from when
the receivers are told until the last of them has everything. Ours has then also verified it against the signed metadata
and written it to disk; the rivals have it in memory, except for "bare stream, kept", which hashes, writes and fsyncs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from delivery import ours, receivers
from delivery.measure import Cost
from rivals import bare_stream, flower, nvflare

SMALL_MB = 100
"""The other size at which our memory is looked at."""
NVFLARE_AGENTS = 2
"""It takes 2 GB for each client."""
PARTS = ("ours", "bare", "memory", "flower", "nvflare")

Row = tuple[str, int, int]
"""Who, MB, agents."""


def main() -> None:
    """Prints the table and, on the last line, one JSON object."""
    asked = _arguments()
    costs = _stream(asked) | _memory(asked) | _rivals(asked)
    print(
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; medians of {asked.runs} for ours and bare\n"
    )
    _print(costs)
    print(json.dumps(_figures(costs, asked.mb)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=300, help="size of the release in MiB")
    parser.add_argument("--agents", default="2,8", help="how many agents, one run for each number")
    parser.add_argument("--runs", type=int, default=5, help="runs of ours and of the bare stream, taking turns")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    asked = parser.parse_args()
    asked.agents = [int(count) for count in asked.agents.split(",")]
    asked.only = set(asked.only.split(","))
    if unknown := asked.only - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    return asked


def _stream(asked: argparse.Namespace) -> dict[Row, Cost]:
    """Ours and the bare stream take turns, so that both see the same machine."""
    found: dict[Row, list[Cost]] = {}
    with ExitStack() as running:
        ways: dict[str, Callable[[int], Cost]] = {}
        if "ours" in asked.only:
            cloud, devices = running.enter_context(ours.cloud(asked.mb, max(asked.agents)))
            ways["ours"] = lambda count: ours.fetch(cloud, devices[:count])
        if "bare" in asked.only:
            pid, command = running.enter_context(bare_stream.server(asked.mb))
            ways["bare stream"] = lambda count: receivers.transfer(pid, [[*command, "count"]] * count, asked.mb)
            ways["bare stream, kept"] = lambda count: receivers.transfer(pid, [[*command, "keep"]] * count, asked.mb)
        for count in asked.agents:
            for _ in range(asked.runs):
                for name, way in ways.items():
                    found.setdefault((name, asked.mb, count), []).append(way(count))
    return {row: _median(costs) for row, costs in found.items()}


def _memory(asked: argparse.Namespace) -> dict[Row, Cost]:
    """Ours with a smaller release: the server's memory must be the same."""
    if "memory" not in asked.only:
        return {}
    with ours.cloud(SMALL_MB, max(asked.agents)) as (cloud, devices):
        return {("ours", SMALL_MB, count): ours.fetch(cloud, devices[:count]) for count in asked.agents}


def _rivals(asked: argparse.Namespace) -> dict[Row, Cost]:
    found: dict[Row, Cost] = {}
    if "flower" in asked.only:
        for count in asked.agents:
            _try(found, ("Flower 1.42", asked.mb, count), flower.push)
    if "nvflare" in asked.only and NVFLARE_AGENTS in asked.agents:
        _try(found, ("NVFLARE 2.9", asked.mb, NVFLARE_AGENTS), nvflare.push)
    return found


def _try(found: dict[Row, Cost], row: Row, push: Callable[[int, int], Cost]) -> None:
    """A rival that cannot be installed or does not work is left out, and standard error says why."""
    name, size_mb, count = row
    try:
        found[row] = push(size_mb, count)
    except (RuntimeError, OSError, TimeoutError, subprocess.SubprocessError) as error:
        print(f"{name} with {count} agents: {error}", file=sys.stderr)


def _median(costs: list[Cost]) -> Cost:
    return Cost(
        statistics.median(cost.wall_s for cost in costs),
        statistics.median(cost.server_cpu_s for cost in costs),
        max(cost.server_rss_mb for cost in costs),
    )


def _print(costs: dict[Row, Cost]) -> None:
    print(f"{'':<20}{'MB':>6}{'agents':>8}{'wall s':>10}{'MB/s':>10}{'server CPU s':>14}{'server RSS MB':>15}")
    for (name, size_mb, count), cost in sorted(costs.items(), key=lambda item: (item[0][2], item[0][1], item[0][0])):
        rate = size_mb * count / cost.wall_s
        print(
            f"{name:<20}{size_mb:>6}{count:>8}{cost.wall_s:>10.2f}{rate:>10.0f}{cost.server_cpu_s:>14.2f}"
            f"{cost.server_rss_mb:>15.0f}"
        )
    print()


def _figures(costs: dict[Row, Cost], size_mb: int) -> dict[str, dict[str, float | None]]:
    def wall_s(name: str, count: int) -> float | None:
        cost = costs.get((name, size_mb, count))
        return cost.wall_s if cost else None

    def ratio(name: str, count: int) -> float | None:
        theirs, own = wall_s(name, count), wall_s("ours", count)
        return theirs / own if theirs and own else None

    own = {row: cost for row, cost in costs.items() if row[0] == "ours"}
    counts = sorted({row[2] for row in own})
    metrics = {f"ours_{count}_s": wall_s("ours", count) for count in counts}
    metrics |= {f"cloud_rss_mb_{row[1]}mb_{row[2]}": cost.server_rss_mb for row, cost in own.items()}
    metrics["cloud_rss_mb"] = max((cost.server_rss_mb for cost in own.values()), default=None)
    bare = [value for count in counts if (value := ratio("bare stream", count))]
    kept = [value for count in counts if (value := ratio("bare stream, kept", count))]
    return {
        "metrics": metrics,
        "rivals": {
            "flower_8_s": wall_s("Flower 1.42", 8),
            "nvflare_2_s": wall_s("NVFLARE 2.9", 2),
            **{f"bare_stream_{count}_s": wall_s("bare stream", count) for count in counts},
            **{f"bare_stream_kept_{count}_s": wall_s("bare stream, kept", count) for count in counts},
        },
        "ratios": {
            "vs_flower_8": ratio("Flower 1.42", 8),
            "vs_nvflare_2": ratio("NVFLARE 2.9", 2),
            "vs_bare_stream": min(kept, default=None),
            "vs_bare_stream_discarded": min(bare, default=None),
        },
    }


if __name__ == "__main__":
    main()
