"""What Ebbflow costs when nothing happens: start of the command lines, memory of an idle cloud and an idle agent.

Run by `make bench NAME=footprint`. It has no rival: the peers' daemons do other work.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

RUNS = 11
SETTLE_S = 15.0
"""Time after which an idle process is measured."""


def program(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"from {module} import main; main()", *arguments]


def start_s(command: list[str]) -> float:
    """Median wall time of a command, after one run that fills the caches."""
    spent = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent[1:])


@contextmanager
def running(command: list[str], ready: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process from when it has bound its ports until the block ends."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not ready.exists():
            assert process.poll() is None, f"{command} ended"
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def resident_mib(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Resident memory of a process and of its children, by name, once nothing happens any more."""
    time.sleep(SETTLE_S)
    found = psutil.Process(process.pid)
    sizes = {"itself": found.memory_info().rss / 2**20}
    for child in found.children():
        name = next((word for word in child.cmdline() if word in {"teach", "work", "gate"}), "other")
        sizes[name] = child.memory_info().rss / 2**20
    return sizes


def main() -> None:
    """Prints the table and, on the last line, one JSON object."""
    metrics = {
        "help_s": start_s(program("ebbflow.cli.main", "--help")),
        "edge_help_s": start_s(program("ebbflow.edge.main", "--help")),
    }
    with tempfile.TemporaryDirectory() as folder:
        home, state = Path(folder) / "cloud", Path(folder) / "agent"
        subprocess.run(
            program("ebbflow.cli.main", "cloud", "init", "--home", str(home)), check=True, capture_output=True
        )
        free = {"EBBFLOW_LISTEN": "127.0.0.1:0", "EBBFLOW_ENROL_LISTEN": "127.0.0.1:0"}
        serve = program("ebbflow.cli.main", "cloud", "serve", "--home", str(home))
        with running(serve, home / "endpoints.toml", free) as cloud:
            context = {**os.environ, "EBBFLOW_CONTEXT": str(home / "admin" / "context.toml")}
            token = subprocess.run(
                program("ebbflow.cli.main", "token", "create"), check=True, capture_output=True, text=True, env=context
            ).stdout.strip()
            address = tomllib.loads((home / "endpoints.toml").read_text())["enrolment"]
            enrol = program("ebbflow.edge.main", "enrol", "--state", str(state), "--cloud", address, "--token", token)
            subprocess.run(enrol, check=True, capture_output=True)
            free = {"EBBFLOW_EDGE_HTTP_LISTEN": "127.0.0.1:0", "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0"}
            run = program("ebbflow.edge.main", "run", "--state", str(state))
            with running(run, state / "endpoints.toml", free) as agent:
                sizes = resident_mib(cloud)
                metrics |= {f"cloud_{name}_mib": size for name, size in sizes.items()}
                metrics["agent_mib"] = resident_mib(agent)["itself"]
    for name, value in metrics.items():
        print(f"{name:<20} {value:10.3f}")
    print(json.dumps({"metrics": metrics, "rivals": {}, "ratios": {}}))


if __name__ == "__main__":
    main()
