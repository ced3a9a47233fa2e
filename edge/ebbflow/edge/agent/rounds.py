"""Answers the rounds of feedback that this device agrees to, and sends what was made private."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import sign
from ebbflow.common.privacy.vector import AdapterContribution, Contribution
from ebbflow.edge.agent.background import in_background
from ebbflow.edge.agent.cloud import Cloud
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
# What may be otherwise a moment later: no decision about a plan.
_PASSING = frozenset({Reason.AGENT_STOPPING, Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.DISK_FULL})


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
        self._declined: dict[bytes, Reason] = {}  # by signature, so that each plan is declined once

    async def look(self) -> float:
        """Answers the open rounds and sends what waits; returns the seconds until the next look.

        What the cloud has been told under this identity is charged before anything is answered, so that a device whose
        disk was lost or restored goes on where it was.

        How long answering takes depends on how many users there are. So what was answered is sent at the next moment of
        a grid that was laid when the plans came, and the cloud hears nothing of rounds before that, whatever it asks.

        Raises:
            EbbflowError: why the cloud could not be asked, or the first thing that went wrong afterwards; what was
                charged is kept and sent later.
        """
        response = await self._cloud.feedback.GetPlan(pb.GetPlanRequest())
        arrived_s = self._stopwatch()
        taken = await asyncio.to_thread(self._store.take_over, response.charges, self._clock.now())
        if taken:
            log.warning("charges_taken_over", rounds=taken)
        failures: list[EbbflowError] = []
        await self._send(failures)
        step_s = 0.0
        for signed in response.plans:
            step_s = max(step_s, await asyncio.to_thread(self._answer, signed, failures))
        if step_s:
            await self._sleep(to_next(step_s, self._stopwatch() - arrived_s))
            await self._send(failures)
        if failures:
            raise failures[0]
        return POLL_S

    def _answer(self, signed: pb.SignedPlan, failures: list[EbbflowError]) -> float:
        """Answers a plan, or keeps why not; no plan keeps another one from being answered.

        Returns:
            The grid's step, if users were looked at; otherwise 0.
        """
        admitted, step_s = None, 0.0
        try:
            admitted = self._admit(signed)
            now = self._clock.now()
            if self._store.has_answered(admitted.plan.round) or now < admitted.answer_from:
                return 0.0
            self._store.check(admitted, now)
            step_s = self._step_s(admitted.plan)
            self._release(admitted)
        except EbbflowError as error:
            if error.reason in _PASSING:
                failures.append(error)
            else:
                self._decline(signed, admitted, error)
        except Exception as error:  # noqa: BLE001 - one bad plan must neither end the look nor hold up what waits
            log.error("round_failed", **place_of(error))
        return step_s

    def _release(self, admitted: AdmittedPlan) -> None:
        contributions, base_release = self._contributions(admitted)
        now = self._clock.now()
        self._store.release_batch(admitted, contributions, self._sign, now, base_release)
        self._clock.charged(now)
        log.info("round_answered", round=admitted.plan.round)

    def _step_s(self, plan: pb.RoundPlan) -> float:
        """The grid's step; where a student computes for every user, it has to be wide."""
        runs_student = plan.HasField("adapter") or plan.measure == pb.RoundPlan.MEASURE_STUDENT
        return self._pace.studied_s if runs_student else self._pace.voted_s

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

    def _admit(self, signed: pb.SignedPlan) -> AdmittedPlan:
        """Decides about a plan, with fresh keys if the known ones do not know its signer."""
        now = self._clock.now()
        try:
            return admit(signed, self._trust.feedback_keys(), self._ceiling, now)
        except EbbflowError as error:
            if error.reason not in {Reason.METADATA_NOT_FOUND, Reason.PLAN_UNTRUSTED}:
                raise
        self._trust.refresh()
        return admit(signed, self._trust.feedback_keys(), self._ceiling, now)

    def _contributions(self, admitted: AdmittedPlan) -> tuple[list[Contribution] | list[AdapterContribution], int]:
        """What users add, and the release that their changes are to; 0 for votes."""
        if admitted.plan.HasField("adapter"):
            return self._updates.contributions(admitted)
        return in_background(lambda: self._votes(admitted)), 0

    def _votes(self, admitted: AdmittedPlan) -> list[Contribution]:
        with self._likeness.of(admitted.plan) as embed:
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
