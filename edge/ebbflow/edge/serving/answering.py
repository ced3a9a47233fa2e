"""From a question to a recorded answer: what the HTTP API and the gRPC service share."""

import asyncio
import datetime as dt
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from ebbflow.common import names
from ebbflow.common.errors import EbbflowError
from ebbflow.edge.feedback.interactions import new_interaction_id
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.batcher import Batcher
from ebbflow.edge.serving.faults import place_of
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Sampling
from ebbflow.edge.serving.sequences import Event, Failed, Finished, Generation, Piece, RunningSequence, Scored, Scoring

log = structlog.get_logger(__name__)

Now = Callable[[], dt.datetime]
"""A clock that returns aware times."""


@dataclass(frozen=True)
class Question:
    """What an application asks."""

    student: str
    """Name as in `Hub.batcher`."""
    prompt: str
    """The text to continue."""
    sampling: Sampling
    user_key: str | None
    """The user in the application's words; None for nobody in particular."""
    said: str | None = None
    """What the user said, where the prompt holds more than that; kept instead of the prompt."""


class Answer:
    """An answer on its way.

    Attributes:
        interaction_id: by which the application can tell the outcome.
        release: which release answers.
    """

    def __init__(self, question: Question, model: Model, store: FeedbackStore, now: Now) -> None:
        """Prepares to receive the answer on the running event loop."""
        self._now = now
        self.interaction_id = new_interaction_id()
        self.release = model.release
        self._question, self._student_id, self._store = question, names.parse(model.student, "students"), store
        self._events = Events()
        self._text = ""
        self._recorded = False
        self._generation: Generation | None = None

    async def start(self, batcher: Batcher, model: Model) -> None:
        """Tokenises beside the event loop, then queues."""
        question = self._question
        generation = await asyncio.to_thread(Generation, model, question.prompt, question.sampling, self._events.put)
        batcher.submit(model, generation)
        self._generation = generation

    async def events(self) -> AsyncGenerator[Piece | Finished, None]:
        """Yields pieces as they come, then the end; by then the interaction is recorded.

        Leaving the iteration early cancels the generation.

        Raises:
            EbbflowError: whatever ended the answer.
        """
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Piece):
                    self._text += event.text
                    yield event
                elif isinstance(event, Finished):
                    await asyncio.shield(self._record())
                    yield event
                    return
        finally:
            await self.close()

    async def close(self) -> None:
        """Cancels what still runs. An answer that was broken off is recorded as far as it was seen. Idempotent."""
        if self._generation:
            self._generation.cancelled = True
        if self._text and not self._recorded:
            await asyncio.shield(self._record())

    async def _record(self) -> None:
        self._recorded = True
        question = self._question
        said = question.prompt if question.said is None else question.said
        record = partial(
            self._store.record_interaction,
            self._student_id,
            self.release,
            question.user_key,
            said,
            self._text,
            interaction_id=self.interaction_id,
            now=self._now(),
        )
        try:
            await asyncio.to_thread(record)
        except EbbflowError as error:  # the user has the answer; only its record is lost
            log.warning("interaction_not_recorded", reason=error.reason.name)
        except Exception as error:  # noqa: BLE001 - likewise
            log.error("interaction_not_recorded", **place_of(error))


class Answering:
    """Asks the students on this device."""

    def __init__(self, hub: Hub, store: FeedbackStore, now: Now = lambda: dt.datetime.now(dt.UTC)) -> None:
        """Takes the students, the record of interactions and the clock by which they are dated."""
        self._hub, self._store, self._now = hub, store, now

    async def ask(self, question: Question) -> Answer:
        """Queues a question.

        Raises:
            EbbflowError: INVALID_REQUEST, CONTEXT_TOO_LONG, NO_MODEL, MODEL_NOT_FOUND, QUEUE_FULL or AGENT_STOPPING.
        """
        batcher = self._hub.batcher(question.student)
        model = batcher.model
        answer = Answer(question, model, self._store, self._now)
        await answer.start(batcher, model)
        return answer

    async def score(self, student: str, text: str) -> tuple[Model, list[float]]:
        """Returns the model and the natural logarithm of each token's probability after the first.

        Raises:
            EbbflowError: as `ask`.
        """
        batcher = self._hub.batcher(student)
        model, events = batcher.model, Events()
        scoring = await asyncio.to_thread(Scoring, model, text, events.put)
        batcher.submit(model, scoring)
        return model, await _scores(scoring, events)


async def _scores(scoring: RunningSequence, events: "Events") -> list[float]:
    try:
        event = await events.get()
    except asyncio.CancelledError:
        scoring.cancelled = True
        raise
    return event.token_log_probs if isinstance(event, Scored) else []


class Events:
    """Carries events from an engine's thread to the event loop that made it."""

    def __init__(self) -> None:
        """Belongs to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._next: Event | None = None

    def put(self, event: Event) -> None:
        """Takes an event; from any thread, without blocking, never raising."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    async def get(self) -> Event:
        """Returns the next event; pieces that have piled up come as one.

        Raises:
            EbbflowError: what a `Failed` carries.
        """
        event, self._next = self._next or await self._queue.get(), None
        while isinstance(event, Piece) and not self._queue.empty():
            following = self._queue.get_nowait()
            if not isinstance(following, Piece):
                self._next = following
                break
            event = Piece(event.text + following.text)
        if isinstance(event, Failed):
            raise event.error
        return event
