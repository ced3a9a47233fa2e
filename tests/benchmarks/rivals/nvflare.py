"""NVFLARE 2.9: its proof-of-concept deployment with mTLS, and a job that sends a model to both clients.

It runs over gRPC, its fastest driver; its clients neither hash nor write what they get; of its rounds the fastest
counts. All in its favour.
"""

import datetime as dt
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from delivery.daemons import daemon
from delivery.measure import Cost, peak_rss_mb, wait_until
from rivals.environments import python

VERSION = "2.9.0"
ROUNDS = 2
FILES = Path(__file__).with_name("nvflare_push")
LIMIT_S = 900.0
READY_S = 180.0
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
_STARTED = re.compile(r"Round (\d+) started")


def push(size_mb: int, clients: int) -> Cost:
    """Sends a model to some clients and measures it.

    Raises:
        RuntimeError, OSError, TimeoutError, subprocess.SubprocessError: it could not be installed, or did not work.
    """
    bin_ = python("nvflare", [f"nvflare=={VERSION}", "omegaconf"]).parent
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder, workspace = Path(name), Path(name) / "poc"
        given = _environment(folder, bin_)

        def run(*words: object) -> None:
            command = [str(bin_ / str(words[0])), *map(str, words[1:])]
            done = subprocess.run(
                command, cwd=folder, env=given, capture_output=True, text=True, timeout=READY_S, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{words[:3]} ended with {done.returncode}: {(done.stderr or done.stdout)[-800:]}")

        for file in FILES.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        run("nvflare", "poc", "prepare", "-i", "project.yml", "--force")
        run("python", "job.py", size_mb, clients, ROUNDS)
        home = workspace / "example_project" / "prod_00"
        watch = running.enter_context(_Watch(home))
        for part in ("server", *(f"site-{number + 1}" for number in range(clients))):
            running.enter_context(daemon(["bash", home / part / "startup" / "sub_start.sh"], folder, given))
        _submit(bin_, folder, given, home)
        rows = folder / "rows.jsonl"
        wait_until("the rounds", lambda: len(_rows(rows)) >= ROUNDS * clients, LIMIT_S)
        return _cost(_rows(rows), home / "server", watch, size_mb, clients)


def _submit(bin_: Path, folder: Path, given: dict[str, str], home: Path) -> None:
    """Submits the job as soon as the server takes it."""
    command = [str(bin_ / "nvflare"), "job", "submit", "-j", str(folder / "jobs" / "push")]

    def taken() -> bool:
        done = subprocess.run(
            command, cwd=folder, env=given, capture_output=True, text=True, timeout=READY_S, check=False
        )
        return done.returncode == 0

    wait_until("the server's start", taken, READY_S)


def _cost(rows: list[dict[str, Any]], server: Path, watch: "_Watch", size_mb: int, clients: int) -> Cost:
    if any(row["size_bytes"] != size_mb << 20 for row in rows):
        raise RuntimeError("NVFLARE's clients did not get everything")
    started = {number: time for path in server.rglob("log.txt") for number, time in _starts(path.read_text())}
    if not started:
        raise RuntimeError("NVFLARE's server logged no start of a round")
    had = {number: [row["had_time"] for row in rows if row["round"] == number] for number in started}
    took = [max(times) - started[number] for number, times in had.items() if len(times) == clients]
    return Cost(min(took), watch.cpu_s / len(took), watch.peak_rss_mb)


def _starts(log: str) -> Iterator[tuple[int, float]]:
    """Yields each round with the time at which it began; the line that names it comes after the one with the time."""
    time = 0.0
    for line in log.splitlines():
        if match := _TIME.match(line):
            time = dt.datetime.strptime(match[0], "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()
        if match := _STARTED.search(line):
            yield int(match[1]), time


class _Watch:
    """Follows every process of the server, which starts one for each job."""

    def __init__(self, home: Path) -> None:
        self._where = str(home / "server")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._spent: dict[int, float] = {}
        self.peak_rss_mb = 0.0
        """Peak of the largest of them."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all of them together."""
        return sum(self._spent.values())

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            for process in psutil.process_iter():
                try:
                    if any(self._where in word for word in process.cmdline()) and "python" in process.name():
                        times = process.cpu_times()
                        self._spent[process.pid] = times.user + times.system
                        self.peak_rss_mb = max(self.peak_rss_mb, peak_rss_mb(process.pid))
                except (psutil.Error, OSError, StopIteration):
                    continue


def _environment(folder: Path, bin_: Path) -> dict[str, str]:
    home = folder / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    own = {"HOME": str(home), "NVFLARE_POC_WORKSPACE": str(folder / "poc")}
    rows = {"EBBFLOW_BENCH_ROWS": str(folder / "rows.jsonl")}
    return kept | own | rows | {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
