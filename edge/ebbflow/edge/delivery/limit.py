"""How many bytes a second may be fetched: a token bucket. No clock and no waiting in here."""

import re

_RATE = re.compile(r"(?P<number>[0-9]{1,12}(?:\.[0-9]{1,6})?) ?(?P<unit>[A-Za-z]+)/s")
_UNITS = {
    "B": 1.0,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "bit": 1 / 8,
    "kbit": 1e3 / 8,
    "Mbit": 1e6 / 8,
    "Gbit": 1e9 / 8,
}
LEAST_RATE = 1000
"""Lowest limit in bytes a second; below it nothing useful would ever arrive."""
LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = 1 << 12, 1 << 20
_PARTS_OF_A_SECOND = 8


def parse_rate(text: str) -> int:
    """Reads a limit such as "2MB/s", "500kbit/s" or "1.5 MiB/s"; "0" means none.

    Returns:
        Bytes a second; 0 for no limit.

    Raises:
        ValueError: saying what a limit looks like.
    """
    if text.strip() in {"0", ""}:
        return 0
    match = _RATE.fullmatch(text.strip())
    if match is None or match["unit"] not in _UNITS:
        raise ValueError(f'a limit is a number with one of {", ".join(_UNITS)} and /s, such as "2MB/s"')
    rate = int(float(match["number"]) * _UNITS[match["unit"]])
    if rate < LEAST_RATE:
        raise ValueError(f"a limit is at least {LEAST_RATE} B/s, or 0 for none")
    return rate


def chunk_bytes(rate: int) -> int:
    """Longest message to ask for under a limit: what comes in an eighth of a second, and a power of two."""
    if rate == 0:
        return MOST_CHUNK_BYTES
    chunk = 1 << max(0, (rate // _PARTS_OF_A_SECOND).bit_length() - 1)
    return min(max(chunk, LEAST_CHUNK_BYTES), MOST_CHUNK_BYTES)


class Bucket:
    """Whoever waits as told takes, in any span of T seconds, at most rate * (T + 1/8) bytes and one chunk.

    Bytes that have come cannot be refused, so a take may leave a debt; the wait pays it back.
    """

    def __init__(self, rate: int, now_s: float) -> None:
        """Begins with an eighth of a second's worth.

        Args:
            rate: bytes a second, more than 0.
            now_s: seconds on a clock that never runs backwards.
        """
        self._rate, self._burst = rate, rate / _PARTS_OF_A_SECOND
        self._tokens, self._at_s = self._burst, now_s

    def take(self, size_bytes: int, now_s: float) -> float:
        """Takes bytes that have come; returns the seconds to wait before more are read."""
        gained = max(0.0, now_s - self._at_s) * self._rate
        self._tokens, self._at_s = min(self._burst, self._tokens + gained) - size_bytes, now_s
        return max(0.0, -self._tokens / self._rate)
