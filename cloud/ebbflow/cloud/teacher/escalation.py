"""Questions that devices escalate: answered by the teacher if an owner allows it, and then forgotten.

Nothing here is stored, logged or learnt from: question and answer live in the memory of this one call.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import student_pb2
from ebbflow.api.v1 import teacher_pb2 as pb
from ebbflow.cloud.registry.tables import Agent, Assignment, Student
from ebbflow.cloud.rollout import selector
from ebbflow.cloud.services.convert.common import from_json
from ebbflow.cloud.teacher.answers import Generation, Score, Scoring
from ebbflow.cloud.teacher.batcher import Batcher
from ebbflow.cloud.teacher.endings import cut
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.cloud.teacher.quota import Quota
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.peers import Identity

DEFAULT_MAX_TOKENS = 128
MOST_TEMPERATURE = 100.0
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
EVERYBODY = "agents"
"""Name under which the quota of all agents together is kept."""

Permission = Callable[[str, str], Awaitable[bool]]
"""Whether an agent (its id) may escalate questions of a student (its id)."""


def may_escalate(session: Session, agent_id: str, student_id: str) -> bool:
    """Whether an owner allows escalation for the student and the agent is one of those that serve it."""
    query = (
        sa.select(Student, Agent.labels)
        .join(Assignment, Assignment.student_id == Student.id)
        .join(Agent, Agent.id == Assignment.agent_id)
        .where(Student.id == student_id, Agent.id == agent_id)
    )
    found = session.execute(query).one_or_none()
    if found is None:
        return False
    student, labels = found
    allowed = from_json(student.escalation_policy, student_pb2.EscalationPolicy).allowed
    return allowed and selector.matches(selector.parse(student.selector), labels)


@dataclass(frozen=True)
class Quotas:
    """How many tokens agents may have computed in a minute."""

    each: Quota
    """By agent."""
    together: Quota
    """Of all agents, so that a fleet leaves the teacher time for others."""

    def take(self, agent: str, tokens: int, now_s: float) -> None:
        """Takes tokens for an agent.

        Raises:
            EbbflowError: QUOTA_EXHAUSTED with `retry_after_s`; INVALID_REQUEST if no quota ever grants that many.
        """
        most = min(self.each.tokens_per_minute, self.together.tokens_per_minute)
        if tokens > most:
            message = f"the question needs {tokens} tokens with its answer; an agent may have {most} in a minute"
            raise EbbflowError(Reason.INVALID_REQUEST, message, tokens=tokens, most=most)
        wait_s = self.each.take(agent, tokens, now_s)
        if wait_s == 0.0:
            wait_s = self.together.take(EVERYBODY, tokens, now_s)
            if wait_s > 0.0:
                self.each.give_back(agent, tokens, now_s)
        if wait_s > 0.0:
            message = f"the teacher has answered enough for now; try again in {wait_s:.1f} s"
            raise EbbflowError(Reason.QUOTA_EXHAUSTED, message, retry_after_s=f"{wait_s:.3f}")

    def give_back(self, agent: str, tokens: int, now_s: float) -> None:
        """Returns what was taken and not needed."""
        self.each.give_back(agent, tokens, now_s)
        self.together.give_back(EVERYBODY, tokens, now_s)


class Escalations:
    """Answers agents."""

    def __init__(
        self,
        teacher: Teacher,
        batcher: Batcher[Generation | Scoring, list[int] | Score],
        permission: Permission,
        quotas: Quotas,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._teacher, self._batcher = teacher, batcher
        self._permission, self._quotas, self._clock = permission, quotas, clock

    async def allowed(self, agent: Identity, student: str) -> bool:
        """Whether an agent may escalate questions of a student, by the student's name. Asks the registry every time.

        Raises:
            EbbflowError: INVALID_REQUEST if it is no student's name.
        """
        return await self._permission(agent.id, names.parse(student, "students"))

    async def answer(self, agent: Identity, request: pb.EscalateRequest) -> pb.EscalateResponse:
        """Answers one question.

        Raises:
            EbbflowError: ESCALATION_FORBIDDEN, INVALID_REQUEST, CONTEXT_TOO_LONG, QUOTA_EXHAUSTED or QUEUE_FULL.
        """
        _check(request)
        if not await self.allowed(agent, request.student):
            message = f"{agent.name} may not escalate questions of {request.student}"
            raise EbbflowError(Reason.ESCALATION_FORBIDDEN, message, student=request.student)
        prompt = await asyncio.to_thread(self._encode, request.prompt)
        job = self._job(prompt, request)
        self._quotas.take(agent.name, len(prompt) + job.max_tokens, self._clock())
        (written,) = await self._batcher.submit([job])
        assert isinstance(written, list)  # noqa: S101 - a Generation's
        self._quotas.give_back(agent.name, job.max_tokens - len(written), self._clock())
        text, stopped = await asyncio.to_thread(self._read, written, request.stop)
        return pb.EscalateResponse(
            text=text,
            truncated=len(written) >= job.max_tokens and not stopped,
            prompt_tokens=len(prompt),
            completion_tokens=len(written),
        )

    def _job(self, prompt: Sequence[int], request: pb.EscalateRequest) -> Generation:
        room = self._teacher.context_tokens - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens; the teacher's context holds {self._teacher.context_tokens}"
            raise EbbflowError(Reason.CONTEXT_TOO_LONG, message, tokens=len(prompt))
        max_tokens = min(request.max_tokens or DEFAULT_MAX_TOKENS, room)
        return Generation(prompt, max_tokens, request.temperature, (request.seed,), tuple(request.stop))

    def _encode(self, prompt: str) -> list[int]:
        tokenizer = self._teacher.tokenizer
        ids = tokenizer.encode(prompt, bos=True)
        return ids if tokenizer.bos_id is not None else [tokenizer.eos_id, *ids]

    def _read(self, written: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
        return cut(self._teacher.tokenizer.decode(written), stops)


def _check(request: pb.EscalateRequest) -> None:
    if not request.prompt:
        raise _wrong("prompt", "is empty")
    if not 0 <= request.temperature <= MOST_TEMPERATURE:
        raise _wrong("temperature", f"must be 0 to {MOST_TEMPERATURE:g}")
    if len(request.stop) > MOST_STOPS or not all(0 < len(stop) <= MOST_STOP_CHARACTERS for stop in request.stop):
        raise _wrong("stop", f"must hold at most {MOST_STOPS} texts of 1 to {MOST_STOP_CHARACTERS} characters")


def _wrong(field: str, message: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, f"{field} {message}", field=field)
