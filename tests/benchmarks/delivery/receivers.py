"""Processes that receive: started, then told all at once, then asked when they had everything."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from delivery.measure import Cost, Meter
from deploy_world import ROOT, environment

_TESTS = [ROOT / "tests", ROOT / "tests" / "benchmarks"]


class Receivers:
    """Each prints a line when it is ready, waits for a line, and prints one JSON object in the end."""

    def __init__(self, processes: Sequence["subprocess.Popen[str]"]) -> None:
        self._processes = processes
        for process in processes:
            self._line(process)

    def go(self) -> tuple[float, list[dict[str, Any]]]:
        """Tells all of them at once, and returns that time and what each said."""
        told_time = time.time()
        for process in self._processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        return told_time, [json.loads(self._line(process)) for process in self._processes]

    @staticmethod
    def _line(process: "subprocess.Popen[str]") -> str:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a receiver ended with code {process.wait()}")
        return line


def start(command: Sequence[object]) -> "subprocess.Popen[str]":
    """Starts a Python script that may import what tests and benchmarks import."""
    given = environment()
    given["PYTHONPATH"] = os.pathsep.join([given["PYTHONPATH"], *map(str, _TESTS)])
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given)


def stop(process: "subprocess.Popen[str]") -> None:
    """Ends it at once."""
    process.kill()
    process.communicate()


@contextmanager
def receivers(commands: Sequence[Sequence[object]]) -> Iterator[Receivers]:
    """Starts scripts that speak this way, and ends them with the block."""
    processes: list[subprocess.Popen[str]] = []
    try:
        processes.extend(start(command) for command in commands)
        yield Receivers(processes)
    finally:
        for process in processes:
            stop(process)


def transfer(server_pid: int, commands: Sequence[Sequence[object]], size_mb: int) -> Cost:
    """Lets all of them receive at once, and measures it together with the server."""
    with receivers(commands) as told:
        meter = Meter(server_pid)
        told_time, said = told.go()
        cost = Cost(max(one["verified_time"] for one in said) - told_time, meter.cpu_s, meter.peak_rss_mb)
    if not all(one["fetched_bytes"] >= size_mb << 20 for one in said):
        raise RuntimeError("a receiver did not get everything")
    return cost
