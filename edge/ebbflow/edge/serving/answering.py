"""From a question to a recorded answer: what the HTTP API and the gRPC service share."""

import asyncio
import datetime as dt
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.interactions import new_interaction_id
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.batcher import Batcher, Embedding
from ebbflow.edge.serving.escalation import Escalation, Review
from ebbflow.edge.serving.events import Events
from ebbflow.edge.serving.faults import place_of
from ebbflow.edge.serving.generation import Generation, Scoring
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.prompts import prompt_tokens
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Finished, Piece, RunningSequence, Scored

log = structlog.get_logger(__name__)

T = TypeVar("T")

_RECORD_S = 1.0

Now = Callable[[], dt.datetime]
"""A clock that returns aware times."""


@dataclass(frozen=True)
class Question:
    """What an application asks."""

    student: str
    """Name as in `Hub.batcher`."""
    prompt: str | Sequence[int]
    """The text to continue, or its tokens."""
    sampling: Sampling
    user_key: str | None
    """The user in the application's words; None for nobody in particular."""
    said: str | None = None
    """What the user said, where the prompt holds more than that; kept instead of the prompt."""
    timeout_s: float | None = None
    """Seconds after which nobody waits for the answer; None leaves it at the agent's own limit."""
    escalate: bool = False
    """The user agrees that the cloud's teacher may see the prompt."""


class Answer:
    """An answer on its way.

    Attributes:
        interaction_id: by which the application can tell the outcome.
    """

    def __init__(
        self, question: Question, model: Model, store: FeedbackStore, now: Now, review: Review | None = None
    ) -> None:
        """Prepares to receive the answer on the running event loop."""
        self._review = review
        self._now = now
        self.interaction_id = new_interaction_id()
        self._question, self._model, self._store = question, model, store
        self._events = Events()
        self._text = ""
        self._recorded = False
        self._generation: Generation | None = None

    @property
    def release(self) -> str:
        """Which release answers; certain once the first piece has come."""
        return self._generation.model.release if self._generation else self._model.release

    @property
    def escalated(self) -> bool:
        """Whether the cloud's teacher answers; certain once the first piece has come."""
        return self._review is not None and self._review.escalated

    async def start(self, batcher: Batcher) -> None:
        """Tokenises beside the event loop, then queues."""
        asked = self._question
        sampling = self._review.sampling if self._review else asked.sampling
        make = partial(Generation, self._model, asked.prompt, sampling, self._events.put, user=asked.user_key or "")
        generation = await asyncio.to_thread(make)
        batcher.submit(generation, asked.timeout_s)
        self._generation = generation

    async def events(self) -> AsyncGenerator[Piece | Finished, None]:
        """Yields pieces as they come, then the end; by then the interaction is recorded, or in the queue to be.

        Leaving the iteration early cancels the generation.

        Raises:
            EbbflowError: whatever ended the answer.
        """
        try:
            while True:
                get = self._events.get
                event = await (self._review.get(get) if self._review else get())
                if isinstance(event, Piece):
                    self._text += event.text
                    yield event
                elif isinstance(event, Finished):
                    await self._record()
                    yield event
                    return
        finally:
            await self.close()

    async def close(self) -> None:
        """Cancels what still runs. An answer that was broken off is recorded as far as it was seen. Idempotent."""
        if self._generation:
            self._generation.cancelled = True
        if self._text and not self._recorded:
            await self._record()

    async def _record(self) -> None:
        """Submits the record, and waits for it for a moment: a file that is busy holds no answer up.

        The record is made also where nobody waits for it any more.
        """
        self._recorded = True
        if self.escalated:  # the student has nothing to learn of it, and the feedback speaks of the student alone
            return
        try:
            record = self._store.submit_interaction(
                self.interaction_id,
                names.parse(self._model.student, "students"),
                self.release,
                self._question.user_key,
                self._said(),
                self._text,
                self._now(),
            )
        except Exception as error:  # noqa: BLE001 - the user has the answer; only its record is lost
            _tell_of(error)
            return
        recording = asyncio.wrap_future(record)
        recording.add_done_callback(_tell)
        await asyncio.wait({recording}, timeout=_RECORD_S)

    def _said(self) -> str:
        asked = self._question
        if asked.said is not None:
            return asked.said
        return asked.prompt if isinstance(asked.prompt, str) else self._model.tokenizer.decode(asked.prompt)


def _tell(recording: "asyncio.Future[None]") -> None:
    if recording.cancelled():
        log.warning("interaction_not_recorded", reason=Reason.AGENT_STOPPING.name)
    elif error := recording.exception():
        _tell_of(error)


def _tell_of(error: BaseException) -> None:
    if isinstance(error, EbbflowError):
        log.warning("interaction_not_recorded", reason=error.reason.name)
    else:
        log.error("interaction_not_recorded", **place_of(error))


async def in_turn(submitted: "Future[T]") -> T:
    """Waits for what the store does in its turn; it is done also if its caller goes away."""
    return await asyncio.shield(asyncio.wrap_future(submitted))


@dataclass(frozen=True)
class Embedded:
    """Texts as vectors."""

    release: str
    vectors: list[Embedding]
    """The mean of the last hidden states of each, [hidden]."""
    tokens: int
    """Of all texts together."""


class Answering:
    """Asks the students on this device."""

    def __init__(
        self,
        hub: Hub,
        store: FeedbackStore,
        now: Now = lambda: dt.datetime.now(dt.UTC),
        escalation: Escalation | None = None,
    ) -> None:
        """Takes the students, the record of interactions, the clock that dates them, and the way to the teacher."""
        self._hub, self._store, self._now, self._escalation = hub, store, now, escalation

    async def ask(self, question: Question) -> Answer:
        """Queues a question.

        Raises:
            EbbflowError: INVALID_REQUEST, CONTEXT_TOO_LONG, NO_MODEL, MODEL_NOT_FOUND, QUEUE_FULL or AGENT_STOPPING.
        """
        batcher = self._hub.batcher(question.student)
        model = batcher.model
        review = self._escalation.review(question, batcher) if self._escalation else None
        answer = Answer(question, model, self._store, self._now, review)
        await answer.start(batcher)
        return answer

    async def score(self, student: str, text: str, timeout_s: float | None = None) -> tuple[Model, list[float]]:
        """Returns the model and the natural logarithm of each token's probability after the first.

        Args:
            student: name as in `Hub.batcher`.
            text: what to score.
            timeout_s: as in `Question`.

        Raises:
            EbbflowError: as `ask`.
        """
        batcher = self._hub.batcher(student)
        model, events = batcher.model, Events()
        scoring = await asyncio.to_thread(Scoring, model, text, events.put)
        batcher.submit(scoring, timeout_s)
        log_probs = await _scores(scoring, events)
        return scoring.model, log_probs

    async def embed(self, student: str, inputs: Sequence[str | Sequence[int]], timeout_s: float | None) -> Embedded:
        """Embeds texts or their tokens, one at a time between the steps of answers.

        Args:
            student: name as in `Hub.batcher`.
            inputs: texts, or their tokens.
            timeout_s: for all of them together; None leaves it at the agent's own limit.

        Raises:
            EbbflowError: INVALID_REQUEST, CONTEXT_TOO_LONG, NO_MODEL, MODEL_NOT_FOUND, QUEUE_FULL, DEADLINE_EXCEEDED or
                AGENT_STOPPING.
        """
        batcher = self._hub.batcher(student)
        model = batcher.model
        try:
            async with asyncio.timeout(timeout_s):
                tokens = [await asyncio.to_thread(prompt_tokens, model, text, 0, "input") for text in inputs]
                vectors = [await asyncio.wrap_future(batcher.embed(token_ids)) for token_ids in tokens]
        except TimeoutError as error:
            raise EbbflowError(Reason.DEADLINE_EXCEEDED, "the time for this request is over") from error
        return Embedded(model.release, vectors, sum(map(len, tokens)))


async def _scores(scoring: RunningSequence, events: "Events") -> list[float]:
    try:
        event = await events.get()
    except asyncio.CancelledError:
        scoring.cancelled = True
        raise
    return event.token_log_probs if isinstance(event, Scored) else []
