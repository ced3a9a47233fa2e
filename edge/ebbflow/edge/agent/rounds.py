"""Answers the rounds of feedback that this device agrees to, and sends what was made private."""

import asyncio

import structlog

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import sign
from ebbflow.edge.agent.cloud import Cloud
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.feedback.lexical import Lexicon
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling, admit
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.hub import Hub

log = structlog.get_logger(__name__)

POLL_S = 300.0
# The cloud's last word on a batch.
_FINAL = frozenset({Reason.BATCH_REFUSED, Reason.BUDGET_EXHAUSTED, Reason.ROUND_CLOSED, Reason.ROUND_NOT_FOUND})


class Rounds:
    """One agent's part in rounds of feedback."""

    def __init__(self, cloud: Cloud, trust: TrustClient, store: FeedbackStore, hub: Hub, ceiling: Ceiling) -> None:
        """Takes the parts that it connects."""
        self._cloud, self._trust, self._store, self._hub, self._ceiling = cloud, trust, store, hub, ceiling
        self._declined: dict[bytes, Reason] = {}  # by signature, so that each plan is declined in the log once

    async def look(self) -> float:
        """Answers the open rounds and sends what waits; returns the seconds until the next look.

        Raises:
            EbbflowError: why the cloud could not be asked; what was charged is kept and sent later.
        """
        response = await self._cloud.feedback.GetPlan(pb.GetPlanRequest())
        for signed in response.plans:
            await asyncio.to_thread(self._answer, signed)
        await self._send()
        return POLL_S

    def _answer(self, signed: pb.SignedPlan) -> None:
        try:
            admitted = self._admit(signed)
            if self._store.has_answered(admitted.plan.round):
                return
            lexicon = self._lexicon(admitted.plan)
            contributions = self._store.contributions(admitted, lexicon) if lexicon else []
            self._store.release_batch(admitted, contributions, self._sign, self._trust.clock.now())
        except EbbflowError as error:
            if error.reason in {Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.DISK_FULL}:
                raise
            if self._declined.get(signed.signature) is not error.reason:
                self._declined[signed.signature] = error.reason
                log.warning("round_declined", reason=error.reason.name, why=str(error))
            return
        log.info("round_answered", round=admitted.plan.round)

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

    def _lexicon(self, plan: pb.RoundPlan) -> Lexicon | None:
        """The measure of likeness, or None without the student: then nobody was served, and the report has no votes."""
        texts = [text for bin_ in plan.bins for text in bin_.texts]
        found = [model.tokenizer for model in self._hub.models() if model.student == plan.student]
        return Lexicon(texts, found[0].encode, found[0].size) if found else None

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
