"""What Linux tells under /sys of heat, battery and energy. A device without a sensor is normal: then it is None."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")
HOT_C = 80.0
"""Where boards begin to slow down; for sensors that do not name a limit of their own."""
_BELOW_CRITICAL_C = 10.0
_PLAUSIBLE_C = (-40.0, 150.0)
_PLAUSIBLE_LIMIT_C = (50.0, 110.0)
_OF_THE_CPU = ("cpu", "core", "k10temp", "zenpower", "soc", "pkg", "package", "bcm")
_FULL_PERCENT = 100.0
_MILLI = 1e3
_MICRO = 1e6


@dataclass(frozen=True)
class Heat:
    """The sensor that is nearest to its limit."""

    temperature_c: float
    hot_c: float
    """Where the device begins, or is about to begin, to slow down."""


@dataclass(frozen=True)
class Battery:
    """The device's own battery, not a mouse's."""

    discharging: bool
    percent: float
    """Of the emptiest one, from 0 to 100."""


def heat(sys: Path = SYS) -> Heat | None:
    """Reads the processor's sensors; where none is named as such, all of them."""
    found = [*_hwmon_heat(sys), *_zone_heat(sys)]
    named = [heat for name, heat in found if any(word in name for word in _OF_THE_CPU)]
    candidates = named or [heat for _, heat in found]
    return max(candidates, key=lambda heat: heat.temperature_c - heat.hot_c, default=None)


def battery(sys: Path = SYS) -> Battery | None:
    """Reads the batteries that run this device."""
    found = []
    for folder in sorted(sys.glob("class/power_supply/*")):
        percent = _number(folder / "capacity")
        if _word(folder / "type") != "Battery" or _word(folder / "scope") == "Device":
            continue
        if percent is not None and 0.0 <= percent <= _FULL_PERCENT:
            found.append((_word(folder / "status") == "Discharging", percent))
    if not found:
        return None
    return Battery(any(discharging for discharging, _ in found), min(percent for _, percent in found))


class EnergyMeter:
    """Joules since it was made, from counters that wrap around (RAPL), or else from those of hwmon."""

    def __init__(self, sys: Path = SYS) -> None:
        """Notes where the counters stand. Only root may read them on many machines; then there are none."""
        packages = [path for path in sys.glob("class/powercap/intel-rapl:*") if path.name.count(":") == 1]
        named = [path for path in packages if _word(path / "name").startswith("package")]
        counters = [path / "energy_uj" for path in named] or list(sys.glob("class/hwmon/hwmon*/energy*_input"))
        self._last = {path: value for path in counters if (value := _number(path)) is not None}
        self._total_uj = 0.0

    def joules(self) -> float | None:
        """Returns the energy so far; None where the machine does not tell. Ask at least once a minute."""
        for path, before in self._last.items():
            now = _number(path)
            if now is None:
                continue
            range_uj = _number(path.parent / "max_energy_range_uj") or 0.0
            self._total_uj += now - before if now >= before else max(0.0, now - before + range_uj)
            self._last[path] = now
        return self._total_uj / _MICRO if self._last else None


def _hwmon_heat(sys: Path) -> Iterator[tuple[str, Heat]]:
    for path in sorted(sys.glob("class/hwmon/hwmon*/temp*_input")):
        stem = path.name.removesuffix("_input")
        limits = (_degrees(path.with_name(f"{stem}_max")), _degrees(path.with_name(f"{stem}_crit")))
        label = f"{_word(path.parent / 'name')} {_word(path.with_name(f'{stem}_label'))}"
        yield from _heat(label, _degrees(path), *limits)


def _zone_heat(sys: Path) -> Iterator[tuple[str, Heat]]:
    for folder in sorted(sys.glob("class/thermal/thermal_zone*")):
        trips = {
            _word(path): _degrees(path.with_name(path.name.replace("_type", "_temp")))
            for path in sorted(folder.glob("trip_point_*_type"))
        }
        yield from _heat(_word(folder / "type"), _degrees(folder / "temp"), trips.get("passive"), trips.get("critical"))


def _heat(
    name: str, temperature_c: float | None, limit_c: float | None, critical_c: float | None
) -> Iterator[tuple[str, Heat]]:
    if temperature_c is None or not _PLAUSIBLE_C[0] < temperature_c < _PLAUSIBLE_C[1]:
        return
    limits = [limit_c, critical_c - _BELOW_CRITICAL_C if critical_c is not None else None]
    said = [limit for limit in limits if limit is not None and _PLAUSIBLE_LIMIT_C[0] <= limit <= _PLAUSIBLE_LIMIT_C[1]]
    yield name.lower(), Heat(temperature_c, min(said, default=HOT_C))


def _degrees(path: Path) -> float | None:
    value = _number(path)
    return None if value is None else value / _MILLI


def _number(path: Path) -> float | None:
    try:
        value = float(_word(path))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _word(path: Path) -> str:
    """What a file of one line says; nothing if it is not there or the driver refuses."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
