"""Numbers as people read them. No IO."""

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_TIME_UNITS = (("d", 86_400), ("h", 3600), ("m", 60))


def size(count_bytes: float) -> str:
    """Returns a number of bytes in decimal units: "83.7 MB"."""
    value, unit = float(count_bytes), 0
    while value >= (1000 if unit == 0 else 999.95) and unit < len(_BYTE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_BYTE_UNITS[unit]}" if unit == 0 else f"{value:.1f} {_BYTE_UNITS[unit]}"


def percent(share: float) -> str:
    """Returns a share in per cent, with as many digits as it needs: "5 %", "0.5 %", "87.3 %"."""
    return f"{100 * share:.3g} %"


def number(value: float) -> str:
    """Returns the shortest text that `float` reads as the same number: "1", "0.05"."""
    return repr(float(value)).removesuffix(".0")


def duration(seconds: float) -> str:
    """Returns a time to the millisecond in the spelling of the command line: "1h30m", "0.5s", "0s"."""
    left_ms = round(seconds * 1000)
    parts = []
    for unit, unit_s in _TIME_UNITS:
        count, left_ms = divmod(left_ms, unit_s * 1000)
        parts += [f"{count}{unit}"] if count else []
    if left_ms or not parts:
        parts.append(f"{number(left_ms / 1000)}s")
    return "".join(parts)


def transfer_time(count_bytes: int, bits_per_second: float) -> str:
    """Returns how long bytes take on a line that carries nothing else: "0.4s", "3m20s"."""
    seconds = count_bytes * 8 / bits_per_second
    if seconds < 10:  # noqa: PLR2004 - below this, tenths say something
        return f"{seconds:.1f}s" if seconds >= 0.05 or not seconds else "<0.1s"  # noqa: PLR2004 - rounds to 0.1
    return duration(round(seconds))
