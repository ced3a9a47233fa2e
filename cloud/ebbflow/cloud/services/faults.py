"""How an error that nobody expected is logged."""

import traceback


def describe(error: BaseException) -> str:
    """The error's type and place, never its text: that may hold SQL parameters or what somebody wrote."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"
