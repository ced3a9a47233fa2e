"""The gRPC shell around the teacher."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from ebbflow.api.v1 import teacher_pb2 as pb
from ebbflow.api.v1 import teacher_pb2_grpc
from ebbflow.cloud.teacher.admission import caller
from ebbflow.cloud.teacher.answers import Generation, Score, Scoring
from ebbflow.cloud.teacher.batcher import Batcher
from ebbflow.cloud.teacher.escalation import Escalations
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.cloud.teacher.quota import Quota
from ebbflow.common.errors import EbbflowError, Reason

MOST_TEXTS = 64
MOST_TOP_COUNT = 64
DEFAULT_MAX_TOKENS = 128
MOST_SCORES = 400_000  # of one response: 8 bytes each, so that it stays below gRPC's 4 MiB
MOST_TEMPERATURE = 100.0

Context = grpc.aio.ServicerContext[Any, Any]


class TeacherService(teacher_pb2_grpc.TeacherServiceServicer):
    """Answers from one teacher. Computing happens in the batcher's thread, cutting text in others."""

    def __init__(
        self,
        teacher: Teacher,
        batcher: Batcher[Generation | Scoring, list[int] | Score],
        quota: Quota,
        escalations: Escalations,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._teacher = teacher
        self._batcher = batcher
        self._quota = quota
        self._escalations = escalations
        self._clock = clock

    async def GetTeacher(self, request: pb.GetTeacherRequest, context: Context) -> pb.GetTeacherResponse:  # noqa: N802
        """Tells which model answers."""
        del request, context
        return pb.GetTeacherResponse(
            model=self._teacher.source,
            architecture=self._teacher.architecture,
            vocabulary_size=self._teacher.vocabulary_size,
            context_tokens=self._teacher.context_tokens,
        )

    async def GenerateTexts(  # noqa: N802
        self, request: pb.GenerateTextsRequest, context: Context
    ) -> pb.GenerateTextsResponse:
        """Continues prompts."""
        _check_count(request.prompts, "prompts")
        if not 0 <= request.temperature <= MOST_TEMPERATURE:
            raise _wrong("temperature", f"must be 0 to {MOST_TEMPERATURE:g}")
        max_tokens = request.max_tokens or DEFAULT_MAX_TOKENS
        prompts = await asyncio.to_thread(self._encode, request.prompts)
        for number, prompt in enumerate(prompts):
            if len(prompt) + max_tokens > self._teacher.context_tokens:
                message = f"{number} has {len(prompt)} tokens; with max_tokens that is more than the teacher's context"
                raise _wrong("prompts", message)
        jobs = [
            Generation(prompt, max_tokens, request.temperature, (request.seed, number))
            for number, prompt in enumerate(prompts)
        ]
        granted = self._charge(context, sum(map(len, prompts)) + max_tokens * len(prompts))
        written = [ids for ids in await self._batcher.submit(jobs) if isinstance(ids, list)]
        unused = max_tokens * len(prompts) - sum(map(len, written))
        self._quota.give_back(granted, unused, self._clock())
        return pb.GenerateTextsResponse(texts=await asyncio.to_thread(self._decode, written))

    async def ScoreTexts(self, request: pb.ScoreTextsRequest, context: Context) -> pb.ScoreTextsResponse:  # noqa: N802
        """Returns the teacher's log-probabilities."""
        _check_count(request.texts, "texts")
        if request.top_count > min(MOST_TOP_COUNT, self._teacher.vocabulary_size):
            raise _wrong("top_count", f"must be 0 to {MOST_TOP_COUNT}")
        texts = await asyncio.to_thread(self._encode, request.texts)
        for number, text in enumerate(texts):
            if len(text) > self._teacher.context_tokens:
                raise _wrong("texts", f"{number} has {len(text)} tokens, more than the teacher's context")
        if sum(map(len, texts)) * (1 + request.top_count) > MOST_SCORES:
            raise _wrong("texts", f"ask for more than {MOST_SCORES} log-probabilities at once")
        self._charge(context, sum(map(len, texts)))
        scores = await self._batcher.submit([Scoring(text, request.top_count) for text in texts])
        return pb.ScoreTextsResponse(
            scores=[
                pb.TextScore(token_ids=text, **vars(score))
                for text, score in zip(texts, scores, strict=True)
                if isinstance(score, Score)
            ]
        )

    async def GetEscalation(  # noqa: N802
        self, request: pb.GetEscalationRequest, context: Context
    ) -> pb.GetEscalationResponse:
        """Tells an agent whether it may escalate."""
        return pb.GetEscalationResponse(allowed=await self._escalations.allowed(caller(context), request.student))

    async def Escalate(self, request: pb.EscalateRequest, context: Context) -> pb.EscalateResponse:  # noqa: N802
        """Answers a question of a device."""
        return await self._escalations.answer(caller(context), request)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Cuts texts into tokens, each begun like a document; where the tokenizer has no token for that, by the end."""
        tokenizer = self._teacher.tokenizer
        encoded = tokenizer.encode_batch(list(texts), bos=True)
        return encoded if tokenizer.bos_id is not None else [[tokenizer.eos_id, *ids] for ids in encoded]

    def _decode(self, written: Sequence[Sequence[int]]) -> list[str]:
        return [self._teacher.tokenizer.decode(ids) for ids in written]

    def _charge(self, context: Context, tokens: int) -> str:
        """Takes tokens from the caller's quota; returns the caller."""
        name = caller(context).name
        if tokens > self._quota.tokens_per_minute:
            message = (
                f"the request needs {tokens} tokens; the quota of a whole minute is {self._quota.tokens_per_minute}"
            )
            raise EbbflowError(Reason.INVALID_REQUEST, message, tokens=tokens)
        wait_s = self._quota.take(name, tokens, self._clock())
        if wait_s > 0:
            message = f"the quota of {name} is used up; try again in {wait_s:.1f} s"
            raise EbbflowError(Reason.QUOTA_EXHAUSTED, message, retry_after_s=f"{wait_s:.3f}")
        return name


def _check_count(texts: Sequence[str], field: str) -> None:
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise _wrong(field, f"must hold 1 to {MOST_TEXTS} texts")


def _wrong(field: str, message: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, f"{field} {message}", field=field)
