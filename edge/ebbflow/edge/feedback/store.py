"""The device's feedback store: one file with what users did, the privacy account and the outbox."""

import datetime as dt
from collections.abc import Callable, Collection
from pathlib import Path

from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback import votes
from ebbflow.edge.feedback.database import Database
from ebbflow.edge.feedback.interactions import Interactions, Retention, new_interaction_id
from ebbflow.edge.feedback.ledger import Account, Ledger, Outgoing
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.users import UserHasher


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class FeedbackStore:
    """`agent.db` and `users.key` beside it. Every method may be called from any thread and may wait for the disk.

    Interactions do not wait for the disk (losing the last few in a power cut harms nobody); the account does.
    """

    def __init__(self, path: Path, retention: Retention | None = None) -> None:
        """Opens the store, or makes it.

        Raises:
            EbbflowError: FILE_CORRUPT, DISK_FULL, SCHEMA_NEWER.
        """
        hasher = UserHasher.load(path.with_name("users.key"))
        self._durable = Database(path, "FULL")
        self._relaxed = Database(path, "NORMAL")
        self._interactions = Interactions(self._relaxed, hasher, retention or Retention())
        self._ledger = Ledger(self._durable)

    def close(self) -> None:
        """Closes the file."""
        self._relaxed.close()
        self._durable.close()

    # What users did

    def record_interaction(
        self,
        student: str,
        release: str,
        user_key: str | None,
        prompt: str,
        answer: str,
        *,
        interaction_id: str | None = None,
        now: dt.datetime | None = None,
    ) -> str:
        """Keeps a request and its answer; returns the interaction's id.

        Args:
            student: id of the student, such as "faq".
            release: name of the release that answered.
            user_key: the application's name for the user; hashed before it is written. None shares one user.
            prompt: what was asked.
            answer: what was answered.
            interaction_id: from `new_interaction_id`, where the id had to be told before the answer was complete.
            now: aware time; the clock's if left out.
        """
        id_ = interaction_id or new_interaction_id()
        self._interactions.record(id_, student, release, user_key, prompt, answer, now or _now())
        return id_

    def record_outcome(self, interaction_id: str, outcome: "rpb.Outcome.ValueType") -> None:
        """Keeps what the user made of an answer; the last outcome counts.

        Raises:
            EbbflowError: INTERACTION_NOT_FOUND, INVALID_REQUEST.
        """
        self._interactions.judge(interaction_id, outcome)

    def purge_user(self, user_key: str | None) -> int:
        """Removes everything that is kept of one user; returns the number of interactions.

        What was sent before was private before it was sent, and stays.
        """
        return self._interactions.purge(user_key)

    def apply_retention(self, now: dt.datetime | None = None) -> int:
        """Removes interactions and batches that are past their time; returns the number of interactions."""
        self._ledger.expire(now or _now())
        return self._interactions.forget_old(now or _now())

    def count(self) -> tuple[int, int]:
        """Returns how many interactions of how many users are kept. Never to be sent anywhere."""
        return self._interactions.count()

    # What leaves the device

    def contributions(self, admitted: AdmittedPlan, embed: votes.Embed) -> list[Contribution]:
        """Chooses one vote for each user of the plan's window. Takes as long as embedding one text for each user."""
        rows = self._interactions.within(admitted.student_id, admitted.start_time, admitted.end_time)
        return votes.contributions_of(admitted.plan, votes.by_user(rows), self._interactions.prompts, embed)

    def release_batch(
        self,
        admitted: AdmittedPlan,
        contributions: Collection[Contribution],
        sign: Callable[[bytes], bytes],
        now: dt.datetime | None = None,
    ) -> bytes:
        """Charges, adds noise and stores the bytes to send, in one durable transaction; again: the same bytes.

        Raises:
            EbbflowError: BUDGET_EXHAUSTED, PLAN_INVALID, DISK_FULL; nothing was charged.
        """
        return self._ledger.release(admitted, contributions, sign, now or _now())

    def has_answered(self, round_name: str) -> bool:
        """Whether the account was charged for a round such as "rounds/5c1e"."""
        return self._ledger.has_answered(round_name)

    def pending(self, now: dt.datetime | None = None) -> list[Outgoing]:
        """Returns the batches to send, oldest first."""
        return self._ledger.pending(now or _now())

    def mark_sent(self, batch_id: str) -> None:
        """Notes that the cloud has kept a batch."""
        self._ledger.settle(batch_id)

    def mark_refused(self, batch_id: str, reason: str) -> None:
        """Notes that the cloud has refused a batch; it is not sent again, and its charge stays."""
        self._ledger.settle(batch_id, reason)

    def accounts(self) -> list[Account]:
        """Returns what was spent, newest window first."""
        return self._ledger.accounts()

    def device_spent_nano(self, window: str) -> int:
        """What all students together have cost in one window of the device's ceiling, in billionths of rho."""
        return self._ledger.device_spent_nano(window)
