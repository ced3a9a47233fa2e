"""The device's feedback store: one file with what users did, the privacy account and the outbox."""

import datetime as dt
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.vector import AdapterContribution, Contribution
from ebbflow.edge.feedback import votes
from ebbflow.edge.feedback.budgets import Span, window_span
from ebbflow.edge.feedback.consent import Consent, Consents, Words
from ebbflow.edge.feedback.database import Database
from ebbflow.edge.feedback.history import Decision
from ebbflow.edge.feedback.identity import Identity
from ebbflow.edge.feedback.interactions import Interaction, Interactions, Retention, new_interaction_id
from ebbflow.edge.feedback.ledger import Account, Ledger, Outgoing
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.release import make_batch
from ebbflow.edge.feedback.turns import Turns
from ebbflow.edge.feedback.users import UserHasher

RECENT_PLANS = 50
"""How many plans `decisions` returns if nobody says otherwise."""
WAITING = 256
"""How many interactions and outcomes may wait for a file that another process keeps busy."""
_CLOSE_S = 5.0
_SCRUB_S = 60.0


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _check_key(database: Database, hasher: UserHasher, path: Path) -> None:
    """Refuses a key by which the users on this device would be others than before.

    A user would then count twice, once under each hash, and a user's refusal would be forgotten.

    Raises:
        EbbflowError: FILE_CORRUPT.
    """
    with database.reading() as connection:
        known = connection.execute("SELECT fingerprint FROM user_keys").fetchall()
    if not known:
        with database.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO user_keys (fingerprint) VALUES (?)", (hasher.fingerprint,))
    elif known != [(hasher.fingerprint,)]:
        message = f"{path} is not the key that {database.path} was written with; restore it, or remove both files"
        raise EbbflowError(Reason.FILE_CORRUPT, message, path=path)


class FeedbackStore:
    """`agent.db` and `users.key` beside it. Every method may be called from any thread and may wait for the disk.

    Interactions do not wait for the disk (losing the last few in a power cut harms nobody); the account does.

    What users do and say is written in the order in which it came, by one thread. Who must not wait for a file that
    another process keeps busy submits it, and waits for as long as it likes.
    """

    def __init__(
        self,
        path: Path,
        retention: Retention | None = None,
        consent: Consent = Consent.ASSUMED,
        identity: Identity | None = None,
    ) -> None:
        """Opens the store, or makes it.

        Args:
            path: of the database; its folder must exist.
            retention: how long interactions stay.
            consent: what holds for users who have not said anything.
            identity: since when the device has been who it is; by default it has been for ever.

        Raises:
            EbbflowError: FILE_CORRUPT, DISK_FULL, SCHEMA_NEWER.
        """
        key_path = path.with_name("users.key")
        hasher = UserHasher.load(key_path)
        self._durable = Database(path, "FULL")
        try:
            _check_key(self._durable, hasher, key_path)
        except BaseException:
            self._durable.close()
            raise
        self._relaxed = Database(path, "NORMAL")
        self._consents = Consents(self._durable, hasher, consent)
        self._interactions = Interactions(self._relaxed, hasher, retention or Retention(), self._consents)
        self._ledger = Ledger(self._durable, identity or Identity())
        self._turns = Turns("feedback", WAITING)
        self._scrubs = Turns("feedback-log", WAITING)

    def close(self) -> None:
        """Writes what waits, unless that takes too long, and closes the file. A log that is being emptied stays."""
        self._turns.finish(_CLOSE_S)
        self._scrubs.abandon()
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
        """Keeps a request and its answer if the user takes part; returns the interaction's id.

        Args:
            student: id of the student, such as "faq".
            release: name of the release that answered.
            user_key: the application's name for the user; hashed before it is written. None shares one user.
            prompt: what was asked.
            answer: what was answered.
            interaction_id: from `new_interaction_id`, where the id had to be told before the answer was complete.
            now: aware time; the clock's if left out.

        Raises:
            EbbflowError: DISK_FULL, FILE_CORRUPT, or as `submit_interaction`.
        """
        id_ = interaction_id or new_interaction_id()
        self.submit_interaction(id_, student, release, user_key, prompt, answer, now).result()
        return id_

    def submit_interaction(
        self,
        interaction_id: str,
        student: str,
        release: str,
        user_key: str | None,
        prompt: str,
        answer: str,
        now: dt.datetime | None = None,
    ) -> "Future[None]":
        """Does as `record_interaction` does, in its turn: behind all that was submitted before.

        Raises:
            EbbflowError: QUEUE_FULL, AGENT_STOPPING.
        """
        row = self._interactions.row(interaction_id, student, release, user_key, prompt, answer, now or _now())
        return self._turns.put_if_room(partial(self._interactions.record, row))

    def record_outcome(self, interaction_id: str, outcome: "rpb.Outcome.ValueType") -> None:
        """Keeps what the user made of an answer; the last outcome counts.

        Raises:
            EbbflowError: INTERACTION_NOT_FOUND, INVALID_REQUEST, or as `submit_interaction`.
        """
        self.submit_outcome(interaction_id, outcome).result()

    def submit_outcome(self, interaction_id: str, outcome: "rpb.Outcome.ValueType") -> "Future[None]":
        """Does as `record_outcome` does, in its turn: its interaction may still wait for its own.

        Raises:
            EbbflowError: as `submit_interaction`.
        """
        return self._turns.put_if_room(partial(self._interactions.judge, interaction_id, outcome))

    def purge_user(self, user_key: str | None) -> int:
        """Removes everything that is kept of one user; returns the number of interactions.

        What was sent before was private before it was sent, and stays.

        Raises:
            EbbflowError: DEADLINE_EXCEEDED if others read the file all the time; what was removed is in its log still.
        """
        return self.submit_purge(user_key).result()

    def submit_purge(self, user_key: str | None) -> "Future[int]":
        """Does as `purge_user` does, in its turn: no record that was submitted before comes after it.

        The log is emptied beside the queue, so that what comes behind need not wait for those who read.
        """
        deadline_s = time.monotonic() + _SCRUB_S
        removing = self._turns.put(partial(self._interactions.purge, user_key))

        def finish() -> int:
            removed = removing.result()
            self._interactions.scrub(max(0.0, deadline_s - time.monotonic()))
            return removed

        return self._scrubs.put(finish)

    def apply_retention(self, now: dt.datetime | None = None) -> int:
        """Removes interactions and batches that are past their time; returns the number of interactions."""
        self._ledger.expire(now or _now())
        return self._interactions.forget_old(now or _now())

    def count(self) -> tuple[int, int]:
        """Returns how many interactions of how many users are kept. Never to be sent anywhere."""
        return self._interactions.count()

    # Who takes part

    @property
    def consent(self) -> Consent:
        """What holds for users who have not said anything."""
        return self._consents.rule

    def set_consent(self, user_key: str | None, *, allowed: bool) -> None:
        """Keeps a user's word on taking part; it holds from the next request and the next report on."""
        self.submit_consent(user_key, allowed=allowed).result()

    def submit_consent(self, user_key: str | None, *, allowed: bool) -> "Future[None]":
        """Does as `set_consent` does, in its turn: what was submitted before is kept by the word that held then."""
        return self._turns.put(partial(self._consents.allow, user_key, allowed=allowed))

    def set_paused(self, user_key: str | None, *, paused: bool) -> None:
        """Stops a user's votes without forgetting anything, or lets the user vote again."""
        self._consents.pause(user_key, paused=paused)

    def words(self) -> Words:
        """Returns how many users have said what. Never to be sent anywhere."""
        return self._consents.count()

    # What leaves the device

    def take_over(self, charges: Iterable[pb.MirroredCharge], now: dt.datetime | None = None) -> int:
        """Charges this device with what the cloud knows of and its own account lacks; returns the number of rounds.

        Raises:
            EbbflowError: PLAN_INVALID if a charge makes no sense, DISK_FULL.
        """
        return self._ledger.take_over(charges, now or _now())

    def check(self, admitted: AdmittedPlan, now: dt.datetime | None = None) -> None:
        """Refuses what `release_batch` would refuse, before anything is computed for it.

        Raises:
            EbbflowError: as `release_batch`.
        """
        self._ledger.check(admitted, now or _now())

    def users(self, admitted: AdmittedPlan) -> dict[bytes, list[Interaction]]:
        """Returns the interactions of the plan's time, by user, of those users who take part and may vote."""
        return votes.by_user(self._interactions.within(admitted.student_id, admitted.start_time, admitted.end_time))

    def texts(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Returns prompt and answer of some interactions, by id; those that are gone meanwhile are left out."""
        return self._interactions.texts(ids)

    def contributions(self, admitted: AdmittedPlan, embed: votes.Embed) -> list[Contribution]:
        """Chooses one vote for each user of the plan's window. Takes as long as embedding one text for each user."""
        return votes.contributions_of(admitted.plan, self.users(admitted), self._interactions.prompts, embed)

    def release_batch(
        self,
        admitted: AdmittedPlan,
        contributions: Collection[Contribution | AdapterContribution],
        sign: Callable[[bytes], bytes],
        now: dt.datetime | None = None,
        base_release: int = 0,
    ) -> bytes:
        """Charges, adds noise and stores the bytes to send, in one durable transaction; again: the same bytes.

        Who was purged, has refused or is paused since the contributions were computed is left out.

        Args:
            admitted: the plan.
            contributions: one for each user, as `contributions` or `users` gave them.
            sign: signs with the key of the agent's certificate.
            now: aware time; the clock's if left out.
            base_release: of adapter updates, the release that they change.

        Raises:
            EbbflowError: BUDGET_EXHAUSTED, LIFETIME_EXHAUSTED, IDENTITY_WAITS, PLAN_INVALID, ROUND_CLOSED, DISK_FULL;
                nothing was charged.
        """

        def make(connection: sqlite3.Connection) -> tuple[str, bytes]:
            span = admitted.student_id, admitted.start_time, admitted.end_time
            left = {interaction.id for interaction in self._interactions.read_within(connection, *span)}
            # A purge takes all that a user had, so that one that is left says that there was none.
            users = [user for user in contributions if user.made_of is None or not left.isdisjoint(user.made_of)]
            return make_batch(admitted, users, sign, base_release)

        return self._ledger.release(admitted, make, now or _now())

    def decline(
        self,
        signed: pb.SignedPlan,
        reason: Reason,
        admitted: AdmittedPlan | None = None,
        now: dt.datetime | None = None,
    ) -> None:
        """Keeps a plan that is not answered, for whoever runs this device.

        Args:
            signed: as the cloud sent it.
            reason: why it is not answered.
            admitted: the plan, if it was sound; then its policy's version is kept too.
            now: aware time; the clock's if left out.
        """
        self._ledger.decline(signed, admitted, reason, now or _now())

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

    def last_charge_time(self) -> dt.datetime | None:
        """When this device was last charged for an answer; None if it never was."""
        return self._ledger.last_charge_time()

    def accounts(self) -> list[Account]:
        """Returns what was spent, newest window first."""
        return self._ledger.accounts()

    def device_spent_nano(self, window: str, window_days: int) -> int:
        """What all students together have cost in one window of the device's ceiling, in billionths of rho."""
        return self._ledger.spent_nano(window_span(window, window_days))

    def lifetime_spent_nano(self, student: str | None = None) -> int:
        """What all windows together have cost, of one student by its id or of all, in billionths of rho."""
        return self._ledger.spent_nano(Span(student))

    def decisions(self, limit: int = RECENT_PLANS) -> list[Decision]:
        """Returns the last plans that came and what became of them, newest first."""
        return self._ledger.decisions(limit)

    def policies(self) -> dict[str, tuple[int, pb.PrivacyPolicy]]:
        """Returns the version and the words of each student's newest policy, by the student's id."""
        return self._ledger.policies()
