"""The registry's clock."""

import datetime as dt


def now() -> dt.datetime:
    """The current time, aware and in UTC."""
    return dt.datetime.now(dt.UTC)
