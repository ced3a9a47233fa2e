"""Answers the rounds of feedback that this device agrees to, and sends what was made private."""

import asyncio

import structlog

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import sign
from ebbflow.common.privacy.vector import AdapterContribution, Contribution
from ebbflow.edge.agent.cloud import Cloud
from ebbflow.edge.agent.likeness import likeness_of
from ebbflow.edge.agent.updates import Updates
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.feedback.identity import Identity
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.hub import Hub

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
_PASSING = frozenset({Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.DISK_FULL})


class Rounds:
    """One agent's part in rounds of feedback."""

    def __init__(
        self, cloud: Cloud, trust: TrustClient, store: FeedbackStore, hub: Hub, ceiling: Ceiling, updates: Updates
    ) -> None:
        """Takes the parts that it connects."""
        self._cloud, self._trust, self._store, self._hub, self._ceiling = cloud, trust, store, hub, ceiling
        self._updates = updates
        self._declined: dict[bytes, Reason] = {}  # by signature, so that each plan is declined once

    async def look(self) -> float:
        """Answers the open rounds and sends what waits; returns the seconds until the next look.

        What the cloud has been told under this identity is charged before anything is answered, so that a device whose
        disk was lost or restored goes on where it was.

        Raises:
            EbbflowError: why the cloud could not be asked; what was charged is kept and sent later.
        """
        response = await self._cloud.feedback.GetPlan(pb.GetPlanRequest())
        taken = await asyncio.to_thread(self._store.take_over, response.charges, self._trust.clock.now())
        if taken:
            log.warning("charges_taken_over", rounds=taken)
        for signed in response.plans:
            await asyncio.to_thread(self._answer, signed)
        await self._send()
        return POLL_S

    def _answer(self, signed: pb.SignedPlan) -> None:
        admitted = None
        try:
            admitted = self._admit(signed)
            now = self._trust.clock.now()
            if self._store.has_answered(admitted.plan.round) or now < admitted.answer_from:
                return
            self._identity.check(admitted, now)
            self._store.check(admitted)
            contributions, base_release = self._contributions(admitted)
            self._store.release_batch(admitted, contributions, self._sign, self._trust.clock.now(), base_release)
        except EbbflowError as error:
            if error.reason in _PASSING:
                raise
            self._decline(signed, admitted, error)
            return
        log.info("round_answered", round=admitted.plan.round)

    def _decline(self, signed: pb.SignedPlan, admitted: AdmittedPlan | None, error: EbbflowError) -> None:
        """Keeps a plan that is not answered, once for each reason."""
        if self._declined.get(signed.signature) is error.reason:
            return
        self._store.decline(signed, error.reason, admitted, self._trust.clock.now())
        self._declined[signed.signature] = error.reason
        log.warning("round_declined", reason=error.reason.name, why=str(error))

    @property
    def _identity(self) -> Identity:
        known = self._cloud.credentials
        return Identity(known.enrol_time, known.new_device)

    def _admit(self, signed: pb.SignedPlan) -> AdmittedPlan:
        """Decides about a plan, with fresh keys if the known ones do not know its signer."""
        now = self._trust.clock.now()
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
        likeness = likeness_of(admitted.plan, self._hub)
        return (self._store.contributions(admitted, likeness) if likeness else []), 0

    def _sign(self, data: bytes) -> bytes:
        return sign(self._cloud.credentials.key(), data)

    async def _send(self) -> None:
        for outgoing in await asyncio.to_thread(self._store.pending, self._trust.clock.now()):
            batch = pb.SignedBatch.FromString(outgoing.signed_batch)
            try:
                await self._cloud.feedback.SubmitBatch(pb.SubmitBatchRequest(batch=batch))
            except EbbflowError as error:
                if error.reason not in _FINAL:
                    raise
                await asyncio.to_thread(self._store.mark_refused, outgoing.batch_id, error.reason.name)
                log.warning("batch_refused", round=outgoing.round, reason=error.reason.name)
            else:
                await asyncio.to_thread(self._store.mark_sent, outgoing.batch_id)
                log.info("batch_sent", round=outgoing.round, size_bytes=len(outgoing.signed_batch))
