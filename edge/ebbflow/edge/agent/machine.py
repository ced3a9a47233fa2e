"""How much of the device is free: its cores, its memory, its heat and its battery. Reads /proc and /sys."""

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ebbflow.edge.agent.sensors import SYS, Battery, Heat, battery, heat

PROC = Path("/proc")
_SLOW_S = 10.0
"""Heat and batteries change slowly; some of their drivers take milliseconds to ask."""
_SHORTEST_S = 0.2
"""The kernel counts time in hundredths of a second: over less than this the counts mean little."""
_KIB = 1024
# Columns of /proc/stat, in ticks: user nice system idle iowait irq softirq steal.
_BUSY = (0, 2, 5, 6, 7)
_NICE = 1


@dataclass(frozen=True)
class MachineReading:
    """One moment of the device."""

    cores: float
    """That this process may use: its affinity, or the quota of its container."""
    free_cores: float
    """Of them, what other programs leave to this one."""
    memory_total_bytes: int
    memory_available_bytes: int
    """What can be taken without driving others out."""
    heat: Heat | None
    battery: Battery | None


class Machine:
    """Reads the device again and again. One thread at a time."""

    def __init__(
        self,
        proc: Path = PROC,
        sys: Path = SYS,
        own_cpu_s: Callable[[], float] = time.process_time,
        cpus: Callable[[], Collection[int]] = lambda: os.sched_getaffinity(0),
        nice: int | None = None,
    ) -> None:
        """Notes where the counters stand.

        Args:
            proc: where the kernel tells of processes.
            sys: where it tells of devices.
            own_cpu_s: seconds of processor time that this process has used.
            cpus: numbers of the processors that it may use.
            nice: priority of this process; None asks the kernel.
        """
        self._proc, self._sys, self._own_cpu_s, self._cpus = proc, sys, own_cpu_s, cpus
        # Programs of a lower priority than ours yield to us, so what they use is free.
        yields = (os.getpriority(os.PRIO_PROCESS, 0) if nice is None else nice) <= 0
        self._columns = _BUSY if yields else (*_BUSY, _NICE)
        self._tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
        self._last: tuple[float, float, float] | None = None  # time, all use, own use
        self._others = 0.0
        self._slow_due_s = float("-inf")
        self._heat: Heat | None = None
        self._battery: Battery | None = None

    def read(self, now_s: float) -> MachineReading:
        """Reads it; `now_s` on a clock that never goes back. Takes about a millisecond."""
        cpus = sorted(self._cpus())
        cores = min(float(len(cpus)), self._quota())
        if now_s >= self._slow_due_s:
            self._slow_due_s = now_s + _SLOW_S
            self._heat, self._battery = heat(self._sys), battery(self._sys)
        total, available = self._memory()
        free = min(cores, max(0.0, len(cpus) - self._used_by_others(cpus, now_s)))
        return MachineReading(cores, free, total, available, self._heat, self._battery)

    def _used_by_others(self, cpus: list[int], now_s: float) -> float:
        """Cores that others have kept busy since the reading before."""
        busy_s, own_s = self._busy_s(cpus), self._own_cpu_s()
        if self._last is None:
            self._last = (now_s, busy_s, own_s)
        before_s, busy_before_s, own_before_s = self._last
        if (passed_s := now_s - before_s) >= _SHORTEST_S:
            self._others = max(0.0, (busy_s - busy_before_s) - (own_s - own_before_s)) / passed_s
            self._last = (now_s, busy_s, own_s)
        return self._others

    def _busy_s(self, cpus: list[int]) -> float:
        names = {f"cpu{number}" for number in cpus}
        ticks = 0
        for line in self._lines("stat"):
            name, *columns = line.split()
            if name in names:
                ticks += sum(int(columns[index]) for index in self._columns if index < len(columns))
        return ticks * self._tick_s

    def _memory(self) -> tuple[int, int]:
        """Bytes in all and bytes that are available, in the device or in what the container may take."""
        said = {line.partition(":")[0]: line.split()[1] for line in self._lines("meminfo")}
        total, available = (int(said.get(name, 0)) * _KIB for name in ("MemTotal", "MemAvailable"))
        limit, used = self._cgroup("memory.max").strip(), self._cgroup("memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            inactive = [line for line in self._cgroup("memory.stat").splitlines() if line.startswith("inactive_file ")]
            used_bytes = int(used) - sum(int(line.split()[1]) for line in inactive)
            total, available = min(total, int(limit)), max(0, min(available, int(limit) - used_bytes))
        return total, available

    def _quota(self) -> float:
        """Cores that a container may use; infinite without a limit."""
        quota, _, period = self._cgroup("cpu.max").partition(" ")
        if not quota.isdecimal() or not period.strip().isdecimal():
            return float("inf")
        return max(0.1, int(quota) / int(period))

    def _cgroup(self, name: str) -> str:
        """A file of this process' own group: a service of systemd, or the container."""
        own = [line.removeprefix("0::/") for line in self._lines("self/cgroup") if line.startswith("0::/")]
        return _text(self._sys / "fs/cgroup" / "".join(own[:1]) / name)

    def _lines(self, name: str) -> list[str]:
        return [line for line in _text(self._proc / name).splitlines() if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
