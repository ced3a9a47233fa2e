"""What a process costs, as the kernel counts it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

_RESET_PEAK = "5"
"""What `/proc/PID/clear_refs` takes to begin a new peak of the resident memory."""


@dataclass(frozen=True)
class Cost:
    """One measured transfer."""

    wall_s: float
    """From when the agents were told until the last of them had the verified file."""
    server_cpu_s: float
    server_rss_mb: float
    """Peak resident memory of the server meanwhile."""


class Meter:
    """Measures one process while something happens."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)
        self._before_s = self._spent_s()

    @property
    def cpu_s(self) -> float:
        """CPU seconds since the beginning."""
        return self._spent_s() - self._before_s

    @property
    def peak_rss_mb(self) -> float:
        """Largest resident memory since the beginning, in 10^6 bytes."""
        return peak_rss_mb(self._process.pid)

    def _spent_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def peak_rss_mb(pid: int) -> float:
    """Largest resident memory of a process since it started, or since the last `Meter` of it, in 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e6


def wait_until(what: str, look: Callable[[], object], limit_s: float) -> None:
    """Waits until something is true.

    Raises:
        TimeoutError: if it does not become so within `limit_s`.
    """
    until = time.monotonic() + limit_s
    while not look():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not happen within {limit_s:.0f} s")
        time.sleep(0.02)
