"""Budget windows: every moment lies in exactly one, and both sides compute which."""

import datetime as dt

_EPOCH = dt.date(1970, 1, 1)

AHEAD = dt.timedelta(days=7)
"""How long before its end a round may be answered.

So whatever a device was charged with ends no later than this after its last answer, however long its windows are.
"""


def window_name(at: dt.datetime, window_days: int) -> str:
    """Returns the first day (UTC) of the window that `at` lies in, such as "2026-11-01".

    Windows of a length tile time from 1970-01-01 on, so that no name can be made up to renew a budget early.

    Args:
        at: an aware time. A round lies in the window of its end.
        window_days: length of a window.
    """
    days = (at.astimezone(dt.UTC).date() - _EPOCH).days
    return (_EPOCH + dt.timedelta(days=days // window_days * window_days)).isoformat()


def window_start(name: str) -> dt.datetime:
    """Returns when a window begins."""
    return dt.datetime.combine(dt.date.fromisoformat(name), dt.time(), dt.UTC)


def window_end(name: str, window_days: int) -> dt.datetime:
    """Returns when a window's successor begins and the budget renews."""
    return window_start(name) + dt.timedelta(days=window_days)


def first_report(enrol_time: dt.datetime, window_days: int, *, new_device: bool) -> dt.datetime:
    """Returns when an agent's users may report first: another identity of the device may have spent their window.

    It may have spent every window that begins less than `AHEAD` after the new identity, of whatever length.

    Args:
        enrol_time: when the agent got its identity.
        window_days: of the student's policy.
        new_device: the operator's word that nobody used the device under another identity.
    """
    if new_device:
        return enrol_time
    last_touched = window_name(enrol_time + AHEAD - dt.timedelta.resolution, window_days)
    return max(enrol_time + dt.timedelta(days=window_days), window_end(last_touched, window_days))
