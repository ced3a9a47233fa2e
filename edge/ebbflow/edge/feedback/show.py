"""What `ebbflow-edge privacy show` says: what leaves this device, what it has cost, what is left. In plain words."""

import datetime as dt

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.privacy.accounting import WINDOWS_PER_YEAR, epsilon_left, epsilon_of, renewed_epsilon
from ebbflow.common.privacy.windows import window_end, window_name
from ebbflow.edge.feedback.consent import Consent
from ebbflow.edge.feedback.identity import Identity
from ebbflow.edge.feedback.ledger import Account
from ebbflow.edge.feedback.plans import Ceiling
from ebbflow.edge.feedback.store import FeedbackStore

LAST_PLANS = 5

_WHAT_LEAVES = """\
What leaves this device
  Once per round one list of numbers: how many users asked for what kind of thing, and where the answer failed.
  Each user counts once, whatever they did. Random noise is added here, before anything is sent.
  No prompt, no answer and no user key ever leaves. Whether this device reports does not depend on anybody using it."""

_ADAPTERS = """\
  This device also answers rounds of adapter updates: numbers by which a student would answer its users a little better.
  Each user's part is cut to one length, and the noise is added here likewise."""

_LIMITS = """\
What this does not promise
  Whoever runs this device can read what is kept on it. A user of two devices is protected on each, not over both.
  A belief that all users share is meant to be learnt; what one user did is what stays hidden.
  The cloud chooses what users vote over. `ebbflow-edge privacy plans` shows it: is it aimed at somebody?"""

_CONSENT = {
    Consent.ASSUMED: "Users take part unless they said no.",
    Consent.REQUIRED: "Users take part only if they said yes.",
}


def _reports(count: int) -> str:
    return "1 report" if count == 1 else f"{count} reports"


def _account_line(account: Account) -> str:
    spent = epsilon_of(account.rho_spent_nano, account.delta)
    left = epsilon_left(account.rho_spent_nano, account.rho_cap_nano, account.delta)
    return (
        f"  {account.student}, window from {account.window}: epsilon {spent:.2f} spent, {left:.2f} left"
        f" (delta {account.delta:g}; {_reports(account.entries)})"
    )


def _ceiling_lines(store: FeedbackStore, ceiling: Ceiling, now: dt.datetime) -> list[str]:
    window = window_name(now, ceiling.window_days)
    renewal = window_end(window, ceiling.window_days).date().isoformat()
    spent = epsilon_of(store.device_spent_nano(window, ceiling.window_days), ceiling.delta)
    ever = epsilon_of(store.lifetime_spent_nano(), ceiling.delta)
    year = renewed_epsilon(ceiling.rho_cap_nano, ceiling.delta)
    limit = f"epsilon {ceiling.lifetime_epsilon:g}" if ceiling.lifetime_epsilon else "not limited"
    return [
        f"The most that this device gives away: epsilon {ceiling.epsilon:g} at delta {ceiling.delta:g} for each user"
        f" and {ceiling.window_days} days",
        f"  Spent in this window over all students: epsilon {spent:.2f}. The budget renews on {renewal}.",
        f"  Renewal adds up: {WINDOWS_PER_YEAR} full windows are epsilon {year:.1f}.",
        f"  All windows together: epsilon {ever:.2f} spent; {limit}.",
    ]


def _policy_lines(student: str, version: int, policy: pb.PrivacyPolicy, spent_nano: int) -> list[str]:
    lifetime = "without a limit over all windows"
    if policy.lifetime_rho_cap_nano:
        most = epsilon_of(policy.lifetime_rho_cap_nano, policy.delta)
        lifetime = f"epsilon {most:.2f} over all windows, of which {epsilon_of(spent_nano, policy.delta):.2f} is spent"
    adapters = "may" if policy.allow_adapters else "may not"
    return [
        f"  {student}, policy version {version}: epsilon {policy.epsilon:g} at delta {policy.delta:g} for"
        f" {policy.window_days} days and {policy.rounds_per_window} rounds, {lifetime}.",
        f"    Rounds {adapters} ask for adapter updates. The cloud keeps reports for {policy.retention_days} days.",
    ]


def _student_lines(store: FeedbackStore) -> list[str]:
    lines: list[str] = []
    for student, (version, policy) in sorted(store.policies().items()):
        lines += _policy_lines(student, version, policy, store.lifetime_spent_nano(student))
    return lines or ["  nothing yet"]


def _waiting_lines(identity: Identity, ceiling: Ceiling, now: dt.datetime) -> list[str]:
    first = identity.first_report(ceiling.window_days)
    if now >= first:
        return []
    return [
        "",
        f"This device got its identity on {identity.enrol_time.date().isoformat()}. Its users report from"
        f" {first.date().isoformat()} on, because another identity may have spent their budget before.",
    ]


def _people_lines(store: FeedbackStore) -> list[str]:
    interactions, users = store.count()
    words = store.words()
    return [
        f"{_CONSENT[store.consent]} Said yes: {words.allowed}, said no: {words.refused}, paused: {words.paused}.",
        f"Kept on this device: {interactions} interactions of {users} users.",
    ]


def _plan_lines(store: FeedbackStore, now: dt.datetime) -> list[str]:
    found = [
        f"  {decision.time:%Y-%m-%d %H:%M} " + ("answered" if decision.answered else f"declined: {decision.reason}")
        for decision in store.decisions(LAST_PLANS)
    ]
    waiting = len(store.pending(now))
    return [*(found or ["  none yet"]), f"  {_reports(waiting)} {'waits' if waiting == 1 else 'wait'} to be sent."]


def describe(store: FeedbackStore, ceiling: Ceiling, identity: Identity, now: dt.datetime) -> str:
    """Returns the text, a few lines without markup.

    Args:
        store: the device's store.
        ceiling: the device's own limit.
        identity: since when the device has been who it is.
        now: aware time, which tells the current window.
    """
    accounts = [_account_line(account) for account in store.accounts()]
    return "\n".join(
        [
            _WHAT_LEAVES,
            *([_ADAPTERS] if ceiling.adapters else []),
            "",
            *_ceiling_lines(store, ceiling, now),
            *_waiting_lines(identity, ceiling, now),
            "",
            "What the students' owners have signed",
            *_student_lines(store),
            "",
            "Spent so far, for each user on this device",
            *(accounts or ["  nothing yet"]),
            "",
            "The last rounds that the cloud asked for",
            *_plan_lines(store, now),
            "",
            *_people_lines(store),
            "",
            _LIMITS,
        ]
    )
