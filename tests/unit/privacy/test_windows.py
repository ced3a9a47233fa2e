"""Every moment lies in one window, and windows tile time."""

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.privacy.windows import AHEAD, first_report, window_end, window_name, window_start

MOMENTS = st.datetimes(dt.datetime(1971, 1, 1), dt.datetime(2200, 1, 1), timezones=st.timezones())  # noqa: DTZ001


@given(MOMENTS, st.integers(1, 366))
def test_a_moment_lies_in_the_window_of_its_name(at: dt.datetime, days: int) -> None:
    name = window_name(at, days)
    end = window_end(name, days)
    assert end - dt.timedelta(days=days) <= at < end
    assert window_name(end, days) == end.date().isoformat()
    assert window_name(end - dt.timedelta(microseconds=1), days) == name


@given(MOMENTS.map(lambda at: at.astimezone(dt.UTC)), st.integers(1, 366), st.floats(0, 1))
def test_a_new_identity_reports_in_the_first_whole_window_that_its_predecessor_cannot_have_been_charged_in(
    enrolled: dt.datetime, days: int, late_share: float
) -> None:
    """Whatever was answered before ends within AHEAD, in whatever windows of whatever length that was."""
    first = first_report(enrolled, days, new_device=False)
    assert enrolled + dt.timedelta(days=days) <= first <= enrolled + dt.timedelta(days=days) + AHEAD
    later = first + late_share * dt.timedelta(days=days)
    assert window_start(window_name(later, days)) >= enrolled + AHEAD
    assert first_report(enrolled, days, new_device=True) == enrolled


@pytest.mark.parametrize(
    ("enrolled", "days", "first"),
    [("2026-10-04", 30, "2026-11-03"), ("2026-10-26", 30, "2026-11-25"), ("2026-10-28", 30, "2026-12-03")],
)
def test_from_when_on_a_new_identity_reports(enrolled: str, days: int, first: str) -> None:
    """Windows of 30 days begin on 2026-10-04, 2026-11-03 and 2026-12-03."""
    assert first_report(window_start(enrolled), days, new_device=False) == window_start(first)
