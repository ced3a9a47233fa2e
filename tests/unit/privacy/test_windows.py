"""Every moment lies in one window, and windows tile time."""

import datetime as dt

from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.privacy.windows import window_end, window_name

MOMENTS = st.datetimes(dt.datetime(1971, 1, 1), dt.datetime(2200, 1, 1), timezones=st.timezones())  # noqa: DTZ001


@given(MOMENTS, st.integers(1, 366))
def test_a_moment_lies_in_the_window_of_its_name(at: dt.datetime, days: int) -> None:
    name = window_name(at, days)
    end = window_end(name, days)
    assert end - dt.timedelta(days=days) <= at < end
    assert window_name(end, days) == end.date().isoformat()
    assert window_name(end - dt.timedelta(microseconds=1), days) == name
