"""Writing down unexpected errors without what they say: their text may hold parts of a prompt."""

import traceback


def place_of(error: BaseException) -> dict[str, str]:
    """Returns the error's kind and where it happened, for a log line."""
    return {"kind": type(error).__name__, "traceback": "".join(traceback.format_tb(error.__traceback__))}
