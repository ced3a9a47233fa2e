"""What is read under /proc and /sys: trees as kernels write them, and this machine's own."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.edge.agent.machine import Machine
from ebbflow.edge.agent.sensors import Battery, EnergyMeter, Heat, battery, heat

MIB = 2**20


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


class Kernel:
    """/proc of a machine with some processors, whose counters the test moves."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        self.ticks = [[0] * 10 for _ in range(cpus)]
        self.own_s, self.now_s = 0.0, 0.0
        write(self.proc, {"meminfo": "MemTotal: 4096000 kB\nMemFree: 10 kB\nMemAvailable: 2048000 kB"})

    def machine(self, allowed: set[int] | None = None, nice: int = 0) -> Machine:
        allowed = allowed if allowed is not None else set(range(len(self.ticks)))
        machine = Machine(self.proc, self.sys, lambda: self.own_s, lambda: allowed, nice)
        self.free(machine)
        return machine

    def free(self, machine: Machine, seconds: float = 1.0, own: float = 0.0, **busy: float) -> float:
        """Lets time pass in which others keep processors busy; `cpu0_user=0.5` is half of the first."""
        self.now_s += seconds
        self.own_s += own * seconds
        columns = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"]
        for name, share in busy.items():
            cpu, column = name.removeprefix("cpu").split("_")
            self.ticks[int(cpu)][columns.index(column)] += round(100 * share * seconds)
        lines = [f"cpu{number} {' '.join(map(str, ticks))}" for number, ticks in enumerate(self.ticks)]
        total = [sum(column) for column in zip(*self.ticks, strict=True)]
        write(self.proc, {"stat": "\n".join([f"cpu  {' '.join(map(str, total))}", *lines, "intr 1 2 3", "ctxt 5"])})
        return machine.read(self.now_s).free_cores


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_what_others_use_is_not_free(kernel: Kernel) -> None:
    machine = kernel.machine()
    assert kernel.free(machine) == 2.0
    assert kernel.free(machine, cpu0_user=0.5, cpu1_system=0.25) == pytest.approx(1.25)
    assert kernel.free(machine, cpu0_softirq=0.1, cpu1_irq=0.1, cpu0_steal=0.8) == pytest.approx(1.0)
    assert kernel.free(machine, cpu0_idle=1, cpu1_iowait=1) == 2.0


def test_what_this_process_uses_is_free(kernel: Kernel) -> None:
    machine = kernel.machine()
    assert kernel.free(machine, own=1.5, cpu0_user=1.0, cpu1_user=1.0) == pytest.approx(1.5)
    assert kernel.free(machine, own=2.1, cpu0_user=1.0, cpu1_user=1.0) == 2.0


def test_those_who_yield_to_us_leave_their_core_free(kernel: Kernel) -> None:
    assert kernel.free(kernel.machine(), cpu0_nice=1.0) == 2.0
    assert kernel.free(kernel.machine(nice=5), cpu0_nice=1.0) == pytest.approx(1.0)


def test_only_processors_that_may_be_used_count(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, cpus=8)
    machine = kernel.machine(allowed={2, 3})
    assert kernel.free(machine, cpu0_user=1.0, cpu2_user=0.5) == pytest.approx(1.5)
    assert machine.read(kernel.now_s).cores == 2.0


def test_moments_too_short_to_count_keep_what_was_found(kernel: Kernel) -> None:
    machine = kernel.machine()
    assert kernel.free(machine, cpu0_user=1.0) == pytest.approx(1.0)
    assert kernel.free(machine, seconds=0.01) == pytest.approx(1.0)


@pytest.mark.parametrize("group", ["", "system.slice/ebbflow-edge.service"])
def test_a_quota_bounds_the_cores_and_a_limit_the_memory(kernel: Kernel, group: str) -> None:
    write(kernel.proc, {"self/cgroup": f"0::/{group}"})
    write(
        kernel.sys / "fs/cgroup" / group,
        {
            "cpu.max": "150000 100000",
            "memory.max": 512 * MIB,
            "memory.current": 400 * MIB,
            "memory.stat": f"anon 5\ninactive_file {100 * MIB}\nactive_file 7",
        },
    )
    reading = kernel.machine().read(kernel.now_s)
    assert (reading.cores, reading.free_cores) == (1.5, 1.5)
    assert (reading.memory_total_bytes, reading.memory_available_bytes) == (512 * MIB, 212 * MIB)


def test_without_a_quota_all_is_the_devices(kernel: Kernel) -> None:
    write(kernel.sys / "fs/cgroup", {"cpu.max": "max 100000", "memory.max": "max", "memory.current": 5})
    reading = kernel.machine().read(kernel.now_s)
    assert (reading.cores, reading.memory_total_bytes, reading.memory_available_bytes) == (2.0, 4000 * MIB, 2000 * MIB)


def test_a_busy_neighbour_is_seen_on_this_machine() -> None:
    machine = Machine()
    machine.read(time.monotonic())
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)  # it starts
        machine.read(time.monotonic())
        begun_s = time.process_time()
        while time.process_time() - begun_s < 0.3:  # our own work beside it
            math.sqrt(2)
        for _ in range(20):  # where this machine itself stands still for a while, nobody was busy
            time.sleep(0.7)
            reading = machine.read(time.monotonic())
            if reading.free_cores <= reading.cores - 0.4:
                break
        else:
            pytest.fail(f"{reading.free_cores} of {reading.cores} cores seem free")
    finally:
        neighbour.kill()
        neighbour.wait()
    assert 0 < reading.memory_available_bytes < reading.memory_total_bytes


def test_the_processors_sensor_that_is_nearest_to_its_limit_counts(tmp_path: Path) -> None:
    assert heat(tmp_path) is None
    hwmon = "class/hwmon/hwmon"
    write(tmp_path, {f"{hwmon}0/name": "nvme", f"{hwmon}0/temp1_input": 90000})
    assert heat(tmp_path) == Heat(90, 80)
    core = {f"{hwmon}1/name": "coretemp", f"{hwmon}1/temp1_input": 70000, f"{hwmon}1/temp1_max": 84000}
    write(tmp_path, core | {f"{hwmon}1/temp1_crit": 100000, f"{hwmon}1/temp2_input": 75000})
    assert heat(tmp_path) == Heat(75, 80)
    write(tmp_path, {f"{hwmon}1/temp2_max": 95000})
    assert heat(tmp_path) == Heat(70, 84)


def test_a_boards_trip_points_are_its_limits(tmp_path: Path) -> None:
    zone = "class/thermal/thermal_zone0"
    write(tmp_path, {f"{zone}/type": "cpu-thermal", f"{zone}/temp": 61234})
    assert heat(tmp_path) == Heat(61.234, 80)
    write(tmp_path, {f"{zone}/trip_point_0_type": "critical", f"{zone}/trip_point_0_temp": 110000})
    assert heat(tmp_path) == Heat(61.234, 100)
    write(tmp_path, {f"{zone}/trip_point_1_type": "passive", f"{zone}/trip_point_1_temp": 85000})
    assert heat(tmp_path) == Heat(61.234, 85)


@pytest.mark.parametrize("nonsense", ["-273000", "65261850", "", "N/A", "1e999"])
def test_drivers_that_talk_nonsense_are_not_believed(tmp_path: Path, nonsense: str) -> None:
    zone = "class/thermal/thermal_zone0"
    write(tmp_path, {f"{zone}/type": "cpu", f"{zone}/temp": nonsense, f"{zone}/trip_point_0_type": "passive"})
    assert heat(tmp_path) is None
    write(tmp_path, {f"{zone}/temp": 50000, f"{zone}/trip_point_0_temp": nonsense})
    assert heat(tmp_path) == Heat(50, 80)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)
@given(st.one_of(st.binary(max_size=40), st.floats().map(lambda value: str(value).encode())))
def test_whatever_a_driver_says_does_no_harm(tmp_path: Path, content: bytes) -> None:
    paths = ["class/thermal/thermal_zone0/temp", "class/hwmon/hwmon0/temp1_input", "class/power_supply/b/capacity"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    write(tmp_path, {"class/power_supply/b/type": "Battery"})
    found = heat(tmp_path)
    assert found is None or -40 < found.temperature_c < 150
    charge = battery(tmp_path)
    assert charge is None or 0 <= charge.percent <= 100


def test_the_devices_own_batteries_count(tmp_path: Path) -> None:
    assert battery(tmp_path) is None
    supply = "class/power_supply"
    write(tmp_path, {f"{supply}/mouse/type": "Battery", f"{supply}/mouse/scope": "Device"})
    write(tmp_path, {f"{supply}/mouse/capacity": 3, f"{supply}/mouse/status": "Discharging"})
    write(tmp_path, {f"{supply}/AC/type": "Mains", f"{supply}/AC/online": 1})
    assert battery(tmp_path) is None
    write(tmp_path, {f"{supply}/BAT0/type": "Battery", f"{supply}/BAT0/capacity": 55})
    write(tmp_path, {f"{supply}/BAT0/status": "Charging"})
    assert battery(tmp_path) == Battery(False, 55)
    write(tmp_path, {f"{supply}/BAT1/type": "Battery", f"{supply}/BAT1/capacity": 12})
    write(tmp_path, {f"{supply}/BAT1/status": "Discharging"})
    assert battery(tmp_path) == Battery(True, 12)


def test_energy_is_counted_through_a_wrap(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules() is None
    rapl = "class/powercap/intel-rapl:0"
    write(tmp_path, {f"{rapl}/name": "package-0", f"{rapl}/energy_uj": 9_000_000})
    write(tmp_path, {f"{rapl}/max_energy_range_uj": 10_000_000})
    write(tmp_path, {"class/powercap/intel-rapl:0:0/name": "core", "class/powercap/intel-rapl:0:0/energy_uj": 1})
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == 0.0
    write(tmp_path, {f"{rapl}/energy_uj": 9_500_000})
    assert meter.joules() == pytest.approx(0.5)
    write(tmp_path, {f"{rapl}/energy_uj": 1_500_000})
    assert meter.joules() == pytest.approx(2.5)


def test_energy_of_hwmon_counts_where_there_is_no_rapl(tmp_path: Path) -> None:
    write(tmp_path, {"class/hwmon/hwmon3/energy1_input": 1_000_000, "class/hwmon/hwmon3/energy2_input": 0})
    meter = EnergyMeter(tmp_path)
    write(tmp_path, {"class/hwmon/hwmon3/energy1_input": 3_000_000, "class/hwmon/hwmon3/energy2_input": 500_000})
    assert meter.joules() == pytest.approx(2.5)
