"""Every moment lies in one window, and windows tile time."""

import datetime as dt

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


@given(
    MOMENTS.map(lambda at: at.astimezone(dt.UTC)),
    st.integers(1, 366),
    st.integers(1, 366),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_what_an_identity_was_charged_with_is_over_when_its_successor_reports(
    answered: dt.datetime, days: int, device_days: int, open_share: float, late_share: float
) -> None:
    """The device's own windows are no longer than the policy's, and a round ends within a window of its answer."""
    device_days = min(days, device_days)
    first = first_report(answered, days, new_device=False)  # enrolled anew at the moment of the old one's last answer
    later = first + late_share * dt.timedelta(days=days)
    for length in (days, device_days):
        end = answered + open_share * dt.timedelta(days=days)
        charged = window_name(end, length)
        if answered >= window_start(charged) - AHEAD:
            assert window_end(charged, length) <= first
            assert window_name(later, length) > charged
