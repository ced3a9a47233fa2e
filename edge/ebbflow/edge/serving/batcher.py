"""The thread that owns a student's engines.

Only this thread touches an engine. A swap adds a lane beside the old one: what was asked before the swap is answered by
the old release to the end, what is asked after it by the new one, and the old engine goes once its lane is empty.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.lane import Lane, Limits
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sequences import RunningSequence

Embedding = npt.NDArray[np.float32]


def stopping() -> EbbflowError:
    """What callers hear when the agent goes down."""
    return EbbflowError(Reason.AGENT_STOPPING, "the agent is stopping")


class Batcher:
    """Answers for one student, whichever of its releases serves."""

    def __init__(self, model: Model, limits: Limits) -> None:
        """Starts the thread."""
        self._limits = limits
        self._wake = threading.Condition()
        self._lanes = [Lane(model, limits)]
        self._arrived: deque[tuple[Model, RunningSequence]] = deque()
        self._jobs: deque[tuple[Future[Embedding], Sequence[int]]] = deque()
        self._model = model
        self._closed = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"engine {model.student}", daemon=True)
        self._thread.start()

    @property
    def model(self) -> Model:
        """The release that answers what comes now."""
        return self._model

    def swap(self, model: Model) -> None:
        """Lets another release answer what comes from now on; returns at once."""
        with self._wake:
            self._model = model
            self._wake.notify()

    def submit(self, model: Model, sequence: RunningSequence) -> None:
        """Queues a sequence that was made for a model; also one that has been swapped out meanwhile.

        Raises:
            EbbflowError: QUEUE_FULL, or AGENT_STOPPING.
        """
        with self._wake:
            if self._closed:
                raise stopping()
            waiting = len(self._arrived) + sum(lane.queued for lane in self._lanes)
            if waiting >= self._limits.queued:
                raise EbbflowError(Reason.QUEUE_FULL, f"{waiting} requests are waiting already", waiting=waiting)
            self._arrived.append((model, sequence))
            self._wake.notify()

    def embed(self, token_ids: Sequence[int]) -> "Future[Embedding]":
        """Returns the mean of the last hidden states, float32 [hidden], computed between two steps."""
        future: Future[Embedding] = Future()
        with self._wake:
            if self._closed:
                raise stopping()
            self._jobs.append((future, token_ids))
            self._wake.notify()
        return future

    def retire(self) -> None:
        """Takes nothing new; the thread ends once everything is answered. Returns at once."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread after the current step; whoever still waits hears AGENT_STOPPING."""
        with self._wake:
            self._closed = self._stopped = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._collect():
            for lane in self._lanes:
                lane.step()
            if self._jobs:
                self._embed(*self._jobs.popleft())
        for lane in self._lanes:
            lane.fail_all(stopping())
        for future, _ in self._jobs:
            future.set_exception(stopping())

    def _embed(self, future: "Future[Embedding]", token_ids: Sequence[int]) -> None:
        try:
            future.set_result(self._model.engine.embed(token_ids))
        except Exception as error:  # noqa: BLE001 - the future carries it to who waits
            future.set_exception(error)

    def _collect(self) -> bool:
        """Hands arrivals to their lanes and waits while there is nothing to do; says whether to go on."""
        with self._wake:
            while not self._sort():
                if self._closed:
                    return False
                self._wake.wait()
            return not self._stopped

    def _sort(self) -> bool:
        """Brings the lanes up to date; says whether there is something to do."""
        while self._arrived:
            model, sequence = self._arrived.popleft()
            self._lane(model).add(sequence)
        self._lane(self._model)
        self._lanes = [lane for lane in self._lanes if lane.model is self._model or not lane.idle]
        return self._stopped or bool(self._jobs) or not all(lane.idle for lane in self._lanes)

    def _lane(self, model: Model) -> Lane:
        for lane in self._lanes:
            if lane.model is model:
                return lane
        self._lanes.append(Lane(model, self._limits))
        return self._lanes[-1]
