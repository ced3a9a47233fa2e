"""The time by which signatures expire, for devices whose own clock may be wrong."""

import datetime as dt
import time
from collections.abc import Callable
from pathlib import Path

from ebbflow.common.files import write_atomic

_STEP = dt.timedelta(hours=1)


class TrustClock:
    """The latest of: the device's clock, the cloud's time as last heard, and the last time that metadata was good.

    It never runs backwards past a time at which metadata was accepted, not even over a restart. A clock that runs ahead
    makes metadata look expired, which stops installing and nothing else; it leaves no trace once it is set right.
    """

    def __init__(
        self,
        path: Path,
        system: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the last good time from `path`, if there is one."""
        self._path, self._system, self._monotonic = path, system, monotonic
        self._heard: tuple[dt.datetime, float] | None = None
        self._floor = self._saved = _read(path)

    def hear(self, server_time: dt.datetime) -> None:
        """Takes the time that the authenticated cloud says it is (aware)."""
        self._heard = (server_time, self._monotonic())

    def now(self) -> dt.datetime:
        """The time, aware and in UTC."""
        latest = max(self._system(), self._floor)
        if self._heard:
            server_time, at_s = self._heard
            latest = max(latest, server_time + dt.timedelta(seconds=self._monotonic() - at_s))
        return latest

    def accept(self, good: dt.datetime) -> None:
        """Remembers a time at which fresh metadata had not expired."""
        self._floor = max(self._floor, good)
        if self._floor - self._saved >= _STEP:  # spares the flash
            write_atomic(self._path, self._floor.isoformat().encode())
            self._saved = self._floor


def _read(path: Path) -> dt.datetime:
    try:
        return dt.datetime.fromisoformat(path.read_text().strip()).astimezone(dt.UTC)
    except (OSError, ValueError, OverflowError):
        return dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
