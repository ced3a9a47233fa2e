"""Answers the rounds of feedback that this device agrees to, and sends what was made private."""

import asyncio
import datetime as dt
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

import structlog

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import sign
from ebbflow.common.privacy.plans import runs_student
from ebbflow.common.privacy.vector import AdapterContribution, Contribution
from ebbflow.edge.agent.background import Halt, in_background
from ebbflow.edge.agent.cloud import Cloud
from ebbflow.edge.agent.held_plans import HeldPlans
from ebbflow.edge.agent.likeness import Likeness
from ebbflow.edge.agent.updates import Updates
from ebbflow.edge.agent.waiting import Pace, to_next
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.feedback.clock import FeedbackClock
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.faults import place_of

log = structlog.get_logger(__name__)

POLL_S = 300.0
# The cloud's last word on a batch.
_FINAL = frozenset(
    {
        Reason.BATCH_REFUSED,
        Reason.BUDGET_EXHAUSTED,
        Reason.LIFETIME_EXHAUSTED,
        Reason.ROUND_CLOSED,
        Reason.ROUND_NOT_FOUND,
    }
)
# What newer keys may change.
_UNKNOWN = frozenset({Reason.METADATA_NOT_FOUND, Reason.PLAN_UNTRUSTED})
# What may be otherwise a moment later: no decision about a plan.
_PASSING = frozenset({Reason.AGENT_STOPPING, Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.DISK_FULL})

_Admitted = tuple[pb.SignedPlan, AdmittedPlan]


class Rounds:
    """One agent's part in rounds of feedback."""

    def __init__(
        self,
        cloud: Cloud,
        trust: TrustClient,
        store: FeedbackStore,
        likeness: Likeness,
        ceiling: Ceiling,
        updates: Updates,
        clock: FeedbackClock,
        pace: Pace | None = None,
        stopwatch: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Takes the parts that it connects."""
        self._cloud, self._trust, self._store, self._likeness, self._ceiling = cloud, trust, store, likeness, ceiling
        self._updates, self._clock, self._pace = updates, clock, pace or Pace()
        self._stopwatch, self._sleep = stopwatch, sleep
        self._held = HeldPlans()
        self._declined: dict[bytes, Reason] = {}  # by signature, so that each plan is declined once
        self._waiting: set[str] = set()  # rounds that were said to wait

    async def look(self) -> float:
        """Answers the open rounds and sends what waits; returns the seconds until the next look.

        What the cloud has been told under this identity is charged before anything is answered, so that a device whose
        disk was lost or restored goes on where it was.

        How long answering takes depends on how many users there are. So what was answered is sent at the next moment of
        a grid that was laid when the plans came, and the cloud hears nothing of rounds before that, whatever it asks:
        newer keys are fetched before anything is computed.

        Whoever cancels a look ends at once what is being computed: nothing is charged, and the round is answered later.

        Raises:
            EbbflowError: why the cloud could not be asked, or the first thing that went wrong afterwards; what was
                charged is kept and sent later.
        """
        response = await self._cloud.feedback.GetPlan(pb.GetPlanRequest(held_rounds=self._held.rounds))
        arrived_s = self._stopwatch()
        plans = self._held.take(response)
        taken = await asyncio.to_thread(self._store.take_over, response.charges, self._clock.now())
        if taken:
            log.warning("charges_taken_over", rounds=taken)
        failures: list[EbbflowError] = []
        await self._send(failures)
        due = await asyncio.to_thread(self._due, plans, failures)
        step_s = 0.0
        halt = Halt()
        try:
            for signed, admitted in due:
                step_s = max(step_s, await asyncio.to_thread(self._answer, signed, admitted, failures, halt))
        finally:
            halt.call()  # else the thread would go on for minutes, and hold up the end of the process
        if step_s:
            await self._sleep(to_next(step_s, self._stopwatch() - arrived_s))
            await self._send(failures)
        if failures:
            raise failures[0]
        return POLL_S

    @contextmanager
    def _kept(
        self, signed: pb.SignedPlan, failures: list[EbbflowError], admitted: AdmittedPlan | None = None
    ) -> Iterator[None]:
        """Keeps why a plan is not answered; no plan keeps another one from being answered."""
        try:
            yield
        except EbbflowError as error:
            if error.reason in _PASSING:
                failures.append(error)
            else:
                self._decline(signed, admitted, error)
        except Exception as error:  # noqa: BLE001 - one bad plan must neither end the look nor hold up what waits
            log.error("round_failed", **place_of(error))

    def _due(self, plans: Iterable[pb.SignedPlan], failures: list[EbbflowError]) -> list[_Admitted]:
        """Returns the plans to answer now.

        What ends before the next moment of the grid could only be charged, and never be sent.
        """
        due = []
        for signed, admitted in self._admit_all(plans, failures):
            with self._kept(signed, failures, admitted):
                if self._is_due(admitted):
                    due.append((signed, admitted))
        now = self._clock.now()
        in_time = [each for _, each in due if not self._ends_within(each, self._step_s(each.plan), now)]
        step_s = max((self._step_s(each.plan) for each in in_time), default=0.0)  # all leave together
        chosen = []
        for signed, admitted in due:
            if self._ends_within(admitted, max(step_s, self._step_s(admitted.plan)), now):
                message = f"{admitted.plan.round} ends before an answer could be sent"
                self._decline(signed, admitted, EbbflowError(Reason.ROUND_CLOSED, message, round=admitted.plan.round))
            else:
                chosen.append((signed, admitted))
        return chosen

    @staticmethod
    def _ends_within(admitted: AdmittedPlan, seconds: float, now: dt.datetime) -> bool:
        return now + dt.timedelta(seconds=seconds) >= admitted.end_time

    def _is_due(self, admitted: AdmittedPlan) -> bool:
        """Whether a plan is to be answered now.

        Raises:
            EbbflowError: why it never is, as `FeedbackStore.check`.
        """
        now, round_ = self._clock.now(), admitted.plan.round
        if self._store.has_answered(round_):
            return False
        if now < admitted.answer_from:
            if round_ not in self._waiting:
                self._waiting.add(round_)
                log.info("round_waits", round=round_, until=admitted.answer_from.isoformat())
            return False
        self._store.check(admitted, now)
        return True

    def _answer(self, signed: pb.SignedPlan, admitted: AdmittedPlan, failures: list[EbbflowError], halt: Halt) -> float:
        """Answers a plan, or keeps why not.

        Returns:
            The grid's step, if users were looked at or there is something to send; otherwise 0, whoever the users are.
        """
        begun = threading.Event()
        with self._kept(signed, failures, admitted):
            halt.check()
            if self._is_due(admitted):  # the plans before it have been charged meanwhile
                self._release(admitted, begun.set, halt)
        return self._step_s(admitted.plan) if begun.is_set() else 0.0

    def _release(self, admitted: AdmittedPlan, begin: Callable[[], None], halt: Halt) -> None:
        contributions, base_release = self._contributions(admitted, begin, halt)
        begin()
        halt.check()  # the store may be closed by now
        now = self._clock.now()
        self._store.release_batch(admitted, contributions, self._sign, now, base_release)
        self._clock.charged(now)
        log.info("round_answered", round=admitted.plan.round)

    def _step_s(self, plan: pb.RoundPlan) -> float:
        """The grid's step; where a student computes for every user, it has to be wide."""
        return self._pace.studied_s if runs_student(plan) else self._pace.voted_s

    def _decline(self, signed: pb.SignedPlan, admitted: AdmittedPlan | None, error: EbbflowError) -> None:
        """Keeps a plan that is not answered, once for each reason."""
        if self._declined.get(signed.signature) is error.reason:
            return
        try:
            self._store.decline(signed, error.reason, admitted, self._clock.now())
        except EbbflowError as unkept:
            log.warning("decision_not_kept", reason=unkept.reason.name)
            return
        self._declined[signed.signature] = error.reason
        log.warning("round_declined", reason=error.reason.name, why=str(error))

    def _admit_all(self, plans: Iterable[pb.SignedPlan], failures: list[EbbflowError]) -> list[_Admitted]:
        """Decides about plans, with newer keys if the known ones do not know all signers."""
        found, unknown = [], []
        for signed in plans:
            with self._kept(signed, failures):
                try:
                    found.append((signed, self._admit(signed)))
                except EbbflowError as error:
                    if error.reason not in _UNKNOWN:
                        raise
                    unknown.append(signed)
        if not unknown:
            return found
        refused: Exception | None = None
        try:
            self._trust.refresh()
        except Exception as error:  # noqa: BLE001 - raised below, for the plans that it concerns
            refused = error
        for signed in unknown:
            with self._kept(signed, failures):
                if refused:
                    raise refused
                found.append((signed, self._admit(signed)))
        return found

    def _admit(self, signed: pb.SignedPlan) -> AdmittedPlan:
        return admit(signed, self._trust.feedback_keys(), self._ceiling, self._clock.now())

    def _contributions(
        self, admitted: AdmittedPlan, begin: Callable[[], None], halt: Halt
    ) -> tuple[list[Contribution] | list[AdapterContribution], int]:
        """What users add, and the release that their changes are to; 0 for votes.

        Votes by words stay at the priority of answers: they hold the interpreter's lock, for which answers would wait
        as long as something else keeps the core busy.
        """
        if admitted.plan.HasField("adapter"):
            return self._updates.contributions(admitted, begin, halt)
        if runs_student(admitted.plan):
            return in_background(lambda: self._votes(admitted, begin, halt)), 0
        return self._votes(admitted, begin, halt), 0

    def _votes(self, admitted: AdmittedPlan, begin: Callable[[], None], halt: Halt) -> list[Contribution]:
        with self._likeness.of(admitted.plan, halt) as embed:
            begin()
            return self._store.contributions(admitted, embed) if embed else []

    def _sign(self, data: bytes) -> bytes:
        return sign(self._cloud.credentials.key(), data)

    async def _send(self, failures: list[EbbflowError]) -> None:
        """Hands in what waits, up to the first batch that the cloud does not take now."""
        for outgoing in await asyncio.to_thread(self._store.pending, self._clock.now()):
            batch = pb.SignedBatch.FromString(outgoing.signed_batch)
            try:
                await self._cloud.feedback.SubmitBatch(pb.SubmitBatchRequest(batch=batch))
            except EbbflowError as error:
                if error.reason not in _FINAL:
                    failures.append(error)
                    return
                await asyncio.to_thread(self._store.mark_refused, outgoing.batch_id, error.reason.name)
                log.warning("batch_refused", round=outgoing.round, reason=error.reason.name)
            else:
                await asyncio.to_thread(self._store.mark_sent, outgoing.batch_id)
                log.info("batch_sent", round=outgoing.round, size_bytes=len(outgoing.signed_batch))
