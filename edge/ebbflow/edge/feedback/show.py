"""What `ebbflow-edge privacy show` says: what leaves this device, what it has cost, what is left. In plain words."""

import datetime as dt

from ebbflow.common.privacy.accounting import WINDOWS_PER_YEAR, epsilon_left, epsilon_of, renewed_epsilon
from ebbflow.common.privacy.windows import window_end, window_name
from ebbflow.edge.feedback.ledger import Account
from ebbflow.edge.feedback.plans import Ceiling
from ebbflow.edge.feedback.store import FeedbackStore

_WHAT_LEAVES = """\
What leaves this device
  Once per round one list of numbers: how many users asked for what kind of thing, and where the answer failed.
  Each user counts once, whatever they did. Random noise is added here, before anything is sent.
  No prompt, no answer and no user key ever leaves. Whether this device reports does not depend on anybody using it."""

_LIMITS = """\
What this does not promise
  Whoever runs this device can read what is kept on it. A user of two devices is protected on each, not over both.
  A belief that all users share is meant to be learnt; what one user did is what stays hidden."""


def _account_line(account: Account) -> str:
    spent = epsilon_of(account.rho_spent_nano, account.delta)
    left = epsilon_left(account.rho_spent_nano, account.rho_cap_nano, account.delta)
    reports = "1 report" if account.entries == 1 else f"{account.entries} reports"
    return (
        f"  {account.student}, window from {account.window}: epsilon {spent:.2f} spent, {left:.2f} left"
        f" (delta {account.delta:g}; {reports})"
    )


def _ceiling_lines(ceiling: Ceiling, spent_nano: int, now: dt.datetime) -> list[str]:
    renewal = window_end(window_name(now, ceiling.window_days), ceiling.window_days).date().isoformat()
    year = renewed_epsilon(ceiling.rho_cap_nano, ceiling.delta)
    spent = epsilon_of(spent_nano, ceiling.delta)
    return [
        f"The most that this device gives away: epsilon {ceiling.epsilon:g} at delta {ceiling.delta:g} for each user"
        f" and {ceiling.window_days} days",
        f"  Spent in this window over all students: epsilon {spent:.2f}. The budget renews on {renewal}.",
        f"  Renewal adds up: {WINDOWS_PER_YEAR} full windows are epsilon {year:.1f}.",
    ]


def describe(store: FeedbackStore, ceiling: Ceiling, now: dt.datetime) -> str:
    """Returns the text, a few lines without markup.

    Args:
        store: the device's store.
        ceiling: the device's own limit.
        now: aware time, which tells the current window.
    """
    interactions, users = store.count()
    accounts = store.accounts()
    waiting = len(store.pending(now))
    spent = store.device_spent_nano(window_name(now, ceiling.window_days))
    return "\n".join(
        [
            _WHAT_LEAVES,
            "",
            *_ceiling_lines(ceiling, spent, now),
            "",
            "Spent so far, for each user on this device",
            *([_account_line(account) for account in accounts] or ["  nothing yet"]),
            "",
            f"Kept on this device: {interactions} interactions of {users} users; {waiting} reports wait to be sent.",
            "",
            _LIMITS,
        ]
    )
