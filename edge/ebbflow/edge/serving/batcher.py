"""The thread that owns a student's engines: only this thread touches them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.serving.faults import place_of
from ebbflow.edge.serving.lane import Limits, StepReport
from ebbflow.edge.serving.load import Load, LoadMeter
from ebbflow.edge.serving.meters import Meters, NoMeters
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.scheduler import Scheduler
from ebbflow.edge.serving.sequences import RunningSequence

Embedding = npt.NDArray[np.float32]
T = TypeVar("T")
Clock = Callable[[], float]

log = structlog.get_logger(__name__)

_LOOK_S = 0.1
"""How often somebody looks for requests that nobody waits for any more, while nothing else happens."""


def stopping() -> EbbflowError:
    """What callers hear when the agent goes down."""
    return EbbflowError(Reason.AGENT_STOPPING, "the agent is stopping")


class Batcher:
    """Answers for one student, whichever of its releases serves. Its methods may be called from any thread."""

    def __init__(
        self, model: Model, limits: Limits, meters: Meters | None = None, clock: Clock = time.monotonic
    ) -> None:
        """Starts the thread."""
        self._limits, self._clock = limits, clock
        self._meters = meters or NoMeters()
        self._meter = LoadMeter()
        self._wake = threading.Condition()  # guards all below, but for the engines
        self._scheduler = Scheduler(model, limits, self._meters)
        self._jobs: deque[tuple[Future[Any], Callable[[Engine], Any]]] = deque()
        self._embeddings: deque[tuple[Future[Embedding], Callable[[Engine], Embedding]]] = deque()
        self._closed = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"engine {model.student}", daemon=True)
        self._thread.start()

    @property
    def model(self) -> Model:
        """The release that answers what comes now."""
        return self._scheduler.model

    @property
    def alive(self) -> bool:
        """Whether the thread runs; without it nobody is answered."""
        return self._thread.is_alive()

    def load(self) -> Load:
        """Returns how busy it is; cheap enough to ask often."""
        with self._wake:
            running, queued = self._scheduler.running, self._scheduler.queued
            prompts = sum(sequence.waiting_tokens for sequence in queued)
            prompts += sum(sequence.waiting_tokens for sequence in running if sequence.waiting_tokens > 1)
        return self._meter.read(len(running), len(queued), prompts, self._clock())

    def swap(self, model: Model, *, instead: bool = False) -> None:
        """Lets another release answer what comes from now on; returns at once. For `instead` see `Hub.swap`."""
        with self._wake:
            self._scheduler.swap(model, instead=instead)
            self._wake.notify_all()

    def submit(self, sequence: RunningSequence, timeout_s: float | None = None) -> None:
        """Queues a sequence; also one for a release that has been swapped out meanwhile.

        Args:
            sequence: what to answer.
            timeout_s: after which nobody waits for it; None leaves it at the limit for all.

        Raises:
            EbbflowError: QUEUE_FULL, or AGENT_STOPPING.
        """
        with self._wake:
            self._check_open()
            now_s = self._clock()
            sequence.deadline_s = None if timeout_s is None else now_s + timeout_s
            self._scheduler.submit(sequence, now_s)
            self._wake.notify_all()

    def between_steps(self, action: Callable[[Engine], T]) -> "Future[T]":
        """Runs something short with the engine that serves, on its thread, before the next step.

        What the action raises, or AGENT_STOPPING, the future carries.

        Raises:
            EbbflowError: AGENT_STOPPING.
        """
        future: Future[T] = Future()
        with self._wake:
            self._check_open()
            self._jobs.append((future, action))
            self._wake.notify_all()
        return future

    def embed(self, token_ids: Sequence[int]) -> "Future[Embedding]":
        """Returns the mean of the last hidden states, float32 [hidden]; one is computed between any two steps.

        Raises:
            EbbflowError: QUEUE_FULL, or AGENT_STOPPING.
        """
        future: Future[Embedding] = Future()
        with self._wake:
            self._check_open()
            waiting = len(self._embeddings)
            if waiting >= self._limits.queued:
                message = f"{waiting} texts are waiting to be embedded already"
                raise EbbflowError(Reason.QUEUE_FULL, message, waiting=waiting, retry_after_s=1)
            self._embeddings.append((future, lambda engine: engine.embed(token_ids)))
            self._wake.notify_all()
        return future

    def hold(self, within_s: float | None = None) -> None:
        """Lets nothing new come to the engine, and waits until nothing runs on it; requests queue up meanwhile.

        Every hold needs a `release`, unless it raises.

        Args:
            within_s: how long to wait; None waits as long as it takes.

        Raises:
            EbbflowError: DEADLINE_EXCEEDED if something still runs then; AGENT_STOPPING.
        """
        with self._wake:
            self._scheduler.holds += 1
            drained = self._wake.wait_for(lambda: self._stopped or not self._scheduler.busy, within_s)
            if self._stopped or not drained:
                self._scheduler.holds -= 1
                self._wake.notify_all()
                raise stopping() if self._stopped else EbbflowError(Reason.DEADLINE_EXCEEDED, "requests still run")

    def release(self) -> None:
        """Lets requests come to the engine again."""
        with self._wake:
            self._scheduler.holds -= 1
            self._wake.notify_all()

    def retire(self) -> None:
        """Takes nothing new; the thread ends once everything is answered. Returns at once."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def stop(self) -> None:
        """Ends the thread after the current step; whoever still waits hears AGENT_STOPPING."""
        self.abandon()
        self._thread.join()

    def abandon(self) -> None:
        """Does as `stop` does, but does not wait for the thread."""
        with self._wake:
            self._closed = self._stopped = True
            self._wake.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise stopping()

    def _run(self) -> None:
        try:
            while self._collect():
                self._turn()
        except Exception as error:  # noqa: BLE001 - an engine's errors end above: this one is ours, and nobody may hang
            log.error("engine_thread_failed", **place_of(error))
        self._end()

    def _turn(self) -> None:
        began_s = self._clock()
        reports = self._scheduler.step(began_s)
        if reports:
            self._settle(reports, began_s)
        self._between()

    def _end(self) -> None:
        with self._wake:
            self._stopped = self._closed = True
            self._scheduler.fail_all(stopping())
            left = [future for future, _ in [*self._jobs, *self._embeddings]]
            self._wake.notify_all()
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(stopping())

    def _collect(self) -> bool:
        """Waits until there is something to do; says whether to go on."""
        with self._wake:
            while not self._stopped:
                if self._scheduler.admit(self._clock()) or self._jobs or self._embeddings:
                    return True
                waiting = bool(self._scheduler.queued)
                if self._closed and not waiting:
                    return False
                self._wake.wait(_LOOK_S if waiting else None)
        return False

    def _settle(self, reports: list[StepReport], began_s: float) -> None:
        now_s = self._clock()
        for report in reports:
            for fed in report.fed:
                if fed.answer_tokens and fed.sequence.begin():
                    self._meter.first_token(now_s - fed.sequence.arrived_s, now_s)
                    self._meters.first_token(now_s - fed.sequence.arrived_s)
        with self._wake:
            tokens = self._scheduler.settle(reports, now_s)
            self._wake.notify_all()
        if any(report.fed for report in reports):
            self._meter.step(now_s - began_s, tokens, now_s)

    def _between(self) -> None:
        """Does all short jobs, and one embedding."""
        with self._wake:
            due = [*self._jobs, *([self._embeddings.popleft()] if self._embeddings else [])]
            self._jobs.clear()
        for future, action in due:
            if future.set_running_or_notify_cancel():
                _fulfil(future, action, self._scheduler.model.engine)


def _fulfil(future: "Future[Any]", action: Callable[[Engine], Any], engine: Engine) -> None:
    try:
        future.set_result(action(engine))
    except Exception as error:  # noqa: BLE001 - the future carries it to who waits
        future.set_exception(error)
