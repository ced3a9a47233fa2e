"""The gRPC service for applications on the device."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

import grpc

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.api.v1 import inference_pb2_grpc, resources_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answering, Question, in_turn
from ebbflow.edge.serving.chances import TokenChance
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import DEFAULT_MAX_TOKENS, Sampling
from ebbflow.edge.serving.sequences import Finish, Finished

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
_FINISHES = {
    Finish.STOP: pb.GenerateResponse.FINISH_REASON_STOP,
    Finish.LENGTH: pb.GenerateResponse.FINISH_REASON_LENGTH,
}
_PRECISIONS = {
    "bf16": resources_pb2.PRECISION_BF16,
    "int8": resources_pb2.PRECISION_INT8,
    "int4": resources_pb2.PRECISION_INT4,
}


class AgentStatus(Protocol):
    """What the service tells of the agent itself."""

    @property
    def connected(self) -> bool:
        """Whether there is a live line to the cloud."""

    @property
    def disconnected_reason(self) -> str:
        """Why there is none, as a word of the error catalogue."""

    def last_installations(self) -> dict[str, resources_pb2.Installation]:
        """The last installation of each student, by its name."""

    def transfers(self) -> pb.GetModelStatusResponse:
        """The part of the answer that is about transfers."""


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """A thin shell: errors leave it as `EbbflowError`, which the server's interceptor turns into a status."""

    def __init__(
        self,
        hub: Hub,
        answering: Answering,
        store: FeedbackStore,
        status: AgentStatus,
        governor: Callable[[str], pb.Governor | None] = lambda _: None,
    ) -> None:
        """Takes what the handlers ask.

        Args:
            hub: the students.
            answering: answers.
            store: what stays on the device.
            status: of the agent.
            governor: tells what the governor of a student, such as "students/faq", has decided.
        """
        self._hub, self._answering, self._store, self._status = hub, answering, store, status
        self._governor = governor

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Streams an answer; ends the generation when the caller goes away or its deadline passes."""
        question = Question(
            request.student,
            request.prompt,
            _sampling(request.sampling, request.top_log_probs if request.HasField("top_log_probs") else None),
            request.user_key or None,
            timeout_s=context.time_remaining(),
            escalate=request.allow_escalation,
        )
        answer = await self._answering.ask(question)
        async with aclosing(answer.events()) as events:
            async for event in events:
                message = pb.GenerateResponse(
                    interaction_id=answer.interaction_id, release=answer.release, escalated=answer.escalated
                )
                if isinstance(event, Finished):
                    message.finish_reason = _FINISHES[event.reason]
                    message.prompt_tokens = event.prompt_tokens
                    message.completion_tokens = event.completion_tokens
                else:
                    message.text = event.text
                    message.log_probs.extend(_log_prob(chance) for chance in event.chances)
                yield message

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext[pb.ScoreRequest, pb.ScoreResponse]
    ) -> pb.ScoreResponse:
        """Scores a text."""
        model, log_probs = await self._answering.score(request.student, request.text, context.time_remaining())
        text_bytes = len(request.text.encode())
        return pb.ScoreResponse(token_log_probs=log_probs, text_bytes=text_bytes, release=model.release)

    async def RecordOutcome(
        self,
        request: pb.RecordOutcomeRequest,
        context: grpc.aio.ServicerContext[pb.RecordOutcomeRequest, pb.RecordOutcomeResponse],
    ) -> pb.RecordOutcomeResponse:
        """Keeps an outcome on this device."""
        if request.outcome == resources_pb2.OUTCOME_UNSPECIFIED:
            raise EbbflowError(Reason.INVALID_REQUEST, "outcome is missing", field="outcome")
        await in_turn(self._store.submit_outcome(request.interaction_id, request.outcome))
        return pb.RecordOutcomeResponse()

    async def SetConsent(
        self,
        request: pb.SetConsentRequest,
        context: grpc.aio.ServicerContext[pb.SetConsentRequest, pb.SetConsentResponse],
    ) -> pb.SetConsentResponse:
        """Keeps a user's word on taking part in feedback, on this device."""
        await in_turn(self._store.submit_consent(request.user_key or None, allowed=request.allowed))
        return pb.SetConsentResponse()

    async def PurgeUser(
        self,
        request: pb.PurgeUserRequest,
        context: grpc.aio.ServicerContext[pb.PurgeUserRequest, pb.PurgeUserResponse],
    ) -> pb.PurgeUserResponse:
        """Forgets a user's requests."""
        count = await in_turn(self._store.submit_purge(request.user_key or None))
        self._hub.forget_prompts()
        return pb.PurgeUserResponse(interactions=count)

    async def GetModelStatus(
        self,
        request: pb.GetModelStatusRequest,
        context: grpc.aio.ServicerContext[pb.GetModelStatusRequest, pb.GetModelStatusResponse],
    ) -> pb.GetModelStatusResponse:
        """Tells what serves, and what was installed or refused last."""
        installations = self._status.last_installations()
        models = {model.student: _model_status(model) for model in self._hub.models()}
        for student, status in models.items():
            if governor := self._governor(student):
                status.governor.CopyFrom(governor)
        for student, installation in installations.items():
            status = models.setdefault(student, pb.ModelStatus(student=student))
            status.last_installation.CopyFrom(installation)
        ordered = [models[student] for student in sorted(models)]
        connected, reason = self._status.connected, self._status.disconnected_reason
        answer = pb.GetModelStatusResponse(models=ordered, connected=connected, disconnected_reason=reason)
        answer.MergeFrom(self._status.transfers())
        return answer


def _model_status(model: Model) -> pb.ModelStatus:
    engine = model.engine
    return pb.ModelStatus(
        student=model.student,
        release=model.release,
        precision=_PRECISIONS.get(engine.precision, resources_pb2.PRECISION_UNSPECIFIED),
        engine=engine.name,
        context_tokens=engine.context_tokens,
        instruction_set=engine.instruction_set,
        engine_reason=engine.reason,
    )


def _log_prob(chance: TokenChance) -> pb.TokenLogProb:
    return pb.TokenLogProb(
        token_id=chance.token_id,
        token=chance.token,
        log_prob=chance.log_prob,
        top=[_log_prob(other) for other in chance.top],
    )


def _sampling(message: pb.Sampling, top_log_probs: int | None) -> Sampling:
    """Reads the options; zeros mean what the contract says they mean."""
    return Sampling(
        max_tokens=message.max_tokens or DEFAULT_MAX_TOKENS,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        stop=tuple(message.stop),
        seed=message.seed if message.HasField("seed") else None,
        top_log_probs=top_log_probs,
    )
