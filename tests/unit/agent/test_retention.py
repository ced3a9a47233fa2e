"""What a device forgets, and when it does not know the time yet."""

import asyncio
import datetime as dt
import os
from pathlib import Path

import pytest

from ebbflow.edge.agent.retention import Purges, retain
from ebbflow.edge.feedback.clock import FeedbackClock
from ebbflow.edge.feedback.store import FeedbackStore

NOW = dt.datetime(2027, 2, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
LOST = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@pytest.mark.parametrize("charged", [None, NOW - 20 * DAY, NOW - 40 * DAY])
def test_a_device_without_a_battery_clock_keeps_what_users_did_when_they_did_it(
    tmp_path: Path, charged: dt.datetime | None
) -> None:
    store = FeedbackStore(tmp_path / "agent.db")
    for days in (1, 5, 40):
        store.record_interaction("faq", "r", f"u{days}", "a file", "ok", now=NOW - days * DAY)
    clock = FeedbackClock(charged, lambda: LOST, lambda: 0.0)
    soon_s = asyncio.run(retain(store, clock))
    assert store.count() == (3, 3)
    clock.hear(NOW)
    assert asyncio.run(retain(store, clock)) > soon_s
    assert store.count() == (2, 2)
    assert store.apply_retention(NOW + 26 * DAY) == 1
    assert store.apply_retention(NOW + 30 * DAY) == 1
    store.close()


def test_a_purge_by_another_process_is_followed_once(tmp_path: Path) -> None:
    marker, forgotten = tmp_path / "purged", []
    os.utime(write(marker), ns=(1, 1))
    purges = Purges(marker, lambda: forgotten.append(len(forgotten)))
    asyncio.run(purges.look())
    assert forgotten == [], "what was purged before the start is in no memory"
    for purge in (1, 2):
        os.utime(write(marker), ns=(1 + purge, 1 + purge))  # a file system's clock may stand still between the two
        for _ in range(2):
            assert asyncio.run(purges.look()) <= 5
        assert len(forgotten) == purge


def test_the_first_purge_of_a_device_is_followed(tmp_path: Path) -> None:
    forgotten: list[bool] = []
    purges = Purges(tmp_path / "purged", lambda: forgotten.append(True))
    asyncio.run(purges.look())
    assert not forgotten
    write(tmp_path / "purged")
    asyncio.run(purges.look())
    assert forgotten == [True]


def write(marker: Path) -> Path:
    marker.touch()
    return marker
