"""Sends hard questions to the cloud's teacher: those whose users agree, where the student is not sure of its answer.

The student answers first, and the whole answer is looked at before anybody sees it. If its confidence is below the
threshold and the budget allows it, the teacher is asked; whatever goes wrong there, the student's answer is the answer.
"""

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from ebbflow.api.v1 import teacher_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.allowance import Allowance
from ebbflow.edge.serving.batcher import Batcher
from ebbflow.edge.serving.calibrations import Calibrations, Texts
from ebbflow.edge.serving.faults import place_of
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Event, Finish, Finished, Piece

log = structlog.get_logger(__name__)

_SEED_BITS = 64
# The cloud does not want questions of this student from this device, and will not soon.
_FORBIDDEN = frozenset({Reason.ESCALATION_FORBIDDEN, Reason.ROLE_INSUFFICIENT})
# This question cannot be answered; the next one may.
_THIS_QUESTION = frozenset({Reason.INVALID_REQUEST, Reason.CONTEXT_TOO_LONG})

Get = Callable[[], Awaitable[Event]]


@dataclass(frozen=True, kw_only=True)
class EscalationLimits:
    """What the device's operator allows."""

    students: frozenset[str]
    """Names of the students whose questions may be escalated, such as "students/faq"."""
    confidence: float = 0.5
    """Answers are hard below this; see `Calibration.confidence`."""
    most: int = 20
    """Most questions that leave the device in a window."""
    window_s: float = 3600.0
    """Length of the window in seconds."""
    timeout_s: float = 10.0
    """Seconds that the teacher has; then the student's answer is given."""


class Asked(Protocol):
    """What a question says; see `Question`."""

    @property
    def prompt(self) -> str | Sequence[int]:
        """The text to continue, or its tokens."""

    @property
    def sampling(self) -> Sampling:
        """How to choose tokens."""

    @property
    def timeout_s(self) -> float | None:
        """Seconds after which nobody waits for the answer."""

    @property
    def escalate(self) -> bool:
        """The user agrees."""


class TeacherLine(Protocol):
    """The cloud's teacher, as this agent reaches it."""

    async def allowed(self, student: str) -> bool:
        """Whether an owner allows this agent to escalate questions of a student."""

    async def answer(self, request: pb.EscalateRequest, timeout_s: float) -> pb.EscalateResponse:
        """Asks the teacher; raises EbbflowError."""


OUTCOMES = ("kept", "escalated", "refused", "failed")
"""What becomes of questions that users let out: the student was sure enough; the teacher answered; budget, permission
or time stood against it; the teacher did not answer."""


class Escalation:
    """Decides which answers are reviewed, and asks the teacher. Belongs to one event loop.

    Attributes:
        counts: how many questions came to each outcome, by student and outcome.
    """

    def __init__(
        self, line: TeacherLine, limits: EscalationLimits, texts: Texts, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Takes the line to the teacher, the limits, and texts to calibrate with."""
        self._line, self._limits, self._clock = line, limits, clock
        self._allowance = Allowance(limits.most, limits.window_s)
        self._calibrations = Calibrations(texts)
        self.counts: Counter[tuple[str, str]] = Counter()

    @property
    def students(self) -> frozenset[str]:
        """Whose questions may be escalated."""
        return self._limits.students

    def review(self, question: Asked, batcher: Batcher) -> "Review | None":
        """Returns what looks at the answer before it is given; None if nothing can come of it."""
        student = batcher.model.student
        wanted = question.escalate and isinstance(question.prompt, str) and question.sampling.top_log_probs is None
        if not wanted or student not in self._limits.students:
            return None
        if not self._allowance.open(student, self._clock()):
            self.counts[student, "refused"] += 1
            return None
        return Review(self, question, batcher, self._clock())

    async def hard(self, batcher: Batcher, log_probs: Sequence[float]) -> bool:
        """Whether the student is unsure of an answer whose tokens have these log-probabilities."""
        calibration = await self._calibrations.of(batcher)
        hard = calibration.confidence(log_probs) < self._limits.confidence
        self.counts[batcher.model.student, "kept"] += not hard
        return hard

    async def ask(self, student: str, question: Asked, since_s: float) -> pb.EscalateResponse | None:
        """Asks the teacher within budget, permission and time; None if the student's answer has to do."""
        left_s = self._limits.timeout_s
        if question.timeout_s is not None:
            left_s = min(left_s, since_s + question.timeout_s - self._clock())
        if left_s <= 0:
            self.counts[student, "refused"] += 1
            return None
        try:
            async with asyncio.timeout(left_s):
                if not await self._permitted(student) or not self._allowance.take(self._clock()):
                    self.counts[student, "refused"] += 1
                    return None
                answer = await self._line.answer(_request(student, question), left_s)
        except TimeoutError:
            self._failed(student, EbbflowError(Reason.DEADLINE_EXCEEDED, "the teacher did not answer in time"))
        except EbbflowError as error:
            self._failed(student, error)
        except Exception as error:  # noqa: BLE001 - the user gets the student's answer, whatever it was
            log.error("escalation_failed", student=student, **place_of(error))
            self.counts[student, "failed"] += 1
            self._allowance.failed(self._clock())
        else:
            self.counts[student, "escalated"] += 1
            self._allowance.succeeded()
            log.info("escalated", student=student)
            return answer
        return None

    async def _permitted(self, student: str) -> bool:
        known = self._allowance.permission(student, self._clock())
        if known is None:
            known = await self._line.allowed(student)
            self._allowance.learn(student, self._clock(), allowed=known)
            if not known:
                log.warning("escalation_forbidden", student=student, cure=Reason.ESCALATION_FORBIDDEN.value.cure)
        return known

    def _failed(self, student: str, error: EbbflowError) -> None:
        self.counts[student, "failed"] += 1
        log.warning("escalation_failed", student=student, reason=error.reason.name)
        if error.reason in _FORBIDDEN:
            self._allowance.learn(student, self._clock(), allowed=False)
        elif error.reason not in _THIS_QUESTION:
            self._allowance.failed(self._clock(), float(error.metadata.get("retry_after_s", 0.0)))


class Review:
    """Holds an answer back until it is whole, and lets it out or the teacher's instead of it.

    Attributes:
        escalated: the teacher has answered; known once the first event is out.
    """

    def __init__(self, escalation: Escalation, question: Asked, batcher: Batcher, since_s: float) -> None:
        """See `Escalation.review`."""
        self._escalation, self._question, self._batcher, self._since_s = escalation, question, batcher, since_s
        self._ready: deque[Event] = deque()
        self.escalated = False

    @property
    def sampling(self) -> Sampling:
        """How the student chooses tokens; it is to say their log-probabilities."""
        return replace(self._question.sampling, top_log_probs=0)

    async def get(self, get: Get) -> Event:
        """Returns the next event of the answer that is given, from those of the student's.

        Raises:
            EbbflowError: whatever ended the student's answer.
        """
        if not self._ready:
            self._ready.extend(await self._look(get))
        return self._ready.popleft()

    async def _look(self, get: Get) -> list[Event]:
        text, log_probs = "", list[float]()
        while isinstance(event := await get(), Piece):
            text += event.text
            log_probs += [chance.log_prob for chance in event.chances]
        student = self._batcher.model.student
        if await self._escalation.hard(self._batcher, log_probs):
            answer = await self._escalation.ask(student, self._question, self._since_s)
            if answer is not None:
                self.escalated = True
                return _events(answer)
        return [Piece(text), event] if text else [event]


def _request(student: str, question: Asked) -> pb.EscalateRequest:
    asked = question.sampling
    seed = secrets.randbits(_SEED_BITS) if asked.seed is None else asked.seed % 2**_SEED_BITS
    return pb.EscalateRequest(
        student=student,
        prompt=str(question.prompt),
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        seed=seed,
        stop=asked.stop,
    )


def _events(answer: pb.EscalateResponse) -> list[Event]:
    reason = Finish.LENGTH if answer.truncated else Finish.STOP
    end = Finished(reason, answer.prompt_tokens, answer.completion_tokens)
    return [Piece(answer.text), end] if answer.text else [end]
