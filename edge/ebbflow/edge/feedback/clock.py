"""The time by which privacy windows are charged, rounds are answered and interactions age."""

import datetime as dt
import sys
import time
from collections.abc import Callable

OLDEST = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
"""This software is not older. A clock that shows an earlier time has lost it."""
_LATEST = dt.datetime(2500, 1, 1, tzinfo=dt.UTC)


def _passed_s() -> float:
    """Seconds since some moment, also those of a machine that is suspended where the system counts them."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class FeedbackClock:
    """The device's own clock, which never goes behind the last charge.

    Windows renew budgets, so whoever sets this clock sets the budget. What the cloud says counts only while the
    device's clock has lost its time, and then once: from there on time passes as fast as it does.
    """

    def __init__(
        self,
        charged: dt.datetime | None = None,
        system: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
        passed_s: Callable[[], float] = _passed_s,
    ) -> None:
        """Begins at the last charge that the account knows of, if there is one."""
        self._system, self._passed_s = system, passed_s
        self._floor = max(charged or OLDEST, OLDEST)
        self._start, self._start_s = self._floor, passed_s()
        self._heard = False

    @property
    def is_known(self) -> bool:
        """Whether `now` is the time: the device has a clock, or the cloud was heard. Else it is later than `now`."""
        return self._heard or self._system() >= OLDEST

    def hear(self, server_time: dt.datetime) -> None:
        """Takes the time that the authenticated cloud says it is (aware), if the device has none and heard none."""
        if self.is_known:
            return
        self._heard = True
        self._start, self._start_s = max(min(server_time, _LATEST), self.now()), self._passed_s()

    def charged(self, at: dt.datetime) -> None:
        """Notes that the account was charged at a time that `now` has returned."""
        self._floor = max(self._floor, at)

    def now(self) -> dt.datetime:
        """The time, aware and in UTC."""
        own = self._system()
        if own < OLDEST:
            own = self._start + dt.timedelta(seconds=self._passed_s() - self._start_s)
        return max(own, self._floor)
