"""Who runs on which engine and who waits: the decisions of one student's serving. No threads and no clock.

A swap adds a lane beside the old one: what runs finishes on the release it began with, and so does what waits, unless
the new release has taken the old one's place. Then it is answered by the new one.
"""

import math
from weakref import WeakSet

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.fair import FairQueue
from ebbflow.edge.serving.lane import Lane, Limits, StepReport
from ebbflow.edge.serving.meters import Meters
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sequences import RunningSequence

_LONGEST_RETRY_S = 60
_REQUEST_WEIGHT = 0.1


class Scheduler:
    """One student's lanes and queue.

    `step` belongs to the thread that owns the engines. The other methods must not run beside each other, and `admit`
    and `settle` not beside `step`.

    Attributes:
        model: the release that answers what comes now.
        holds: how many ask that nobody new comes to an engine.
    """

    def __init__(self, model: Model, limits: Limits, meters: Meters) -> None:
        """Starts without requests."""
        self.model = model
        self.holds = 0
        self._limits, self._meters = limits, meters
        self._queue: FairQueue[RunningSequence] = FairQueue(limits.queued)
        self._displaced: list[RunningSequence] = []  # who come back before anybody new, oldest first
        self._lanes = [Lane(model, limits)]
        self._gone: WeakSet[Model] = WeakSet()
        self._request_s = 0.0  # that a request takes, as an exponentially weighted average

    @property
    def queued(self) -> list[RunningSequence]:
        """The sequences that wait for a place."""
        return [*self._displaced, *self._queue]

    @property
    def running(self) -> list[RunningSequence]:
        """The sequences on engines."""
        return [sequence for lane in self._lanes for sequence in lane.running]

    @property
    def busy(self) -> bool:
        """Whether somebody is on an engine, or was and must come back to it."""
        return bool(self._displaced) or any(lane.running for lane in self._lanes)

    @property
    def releases(self) -> list[str]:
        """The releases whose engines are held on to."""
        return [lane.model.release for lane in self._lanes]

    def swap(self, model: Model, *, instead: bool) -> None:
        """Lets another release answer what comes from now on, and what waits if the old one can answer nothing more."""
        if instead or model.engine is self.model.engine:
            self._gone.add(self.model)
        self.model = model

    def submit(self, sequence: RunningSequence, now_s: float) -> None:
        """Queues a sequence; also one for a release that has been swapped out meanwhile.

        Raises:
            EbbflowError: QUEUE_FULL.
        """
        sequence.arrived_s = now_s
        latest_s = now_s + self._limits.request_s
        sequence.deadline_s = latest_s if sequence.deadline_s is None else min(latest_s, sequence.deadline_s)
        self._meters.arrived()
        dropped = self._queue.push(sequence)
        if dropped is None:
            return
        self._meters.refused(Reason.QUEUE_FULL.name.lower())
        error = self._full()
        if dropped is sequence:
            raise error
        dropped.fail(error)

    def _full(self) -> EbbflowError:
        """Tells to come back when about one place for each who waits now has become free."""
        waiting = len(self._queue)
        rounds = 1 + waiting / self._limits.running
        retry_s = min(_LONGEST_RETRY_S, max(1, math.ceil(rounds * self._request_s)))
        message = f"{waiting} requests are waiting already"
        return EbbflowError(Reason.QUEUE_FULL, message, waiting=waiting, retry_after_s=retry_s)

    def admit(self, now_s: float) -> bool:
        """Lets in whoever fits, in their turn, and out of the queue whoever nobody waits for; says if a step is due."""
        self._sweep(now_s)
        while self._has_room() and (self._displaced or (len(self._queue) and not self.holds)):
            self._start(self._displaced.pop(0) if self._displaced else self._queue.pop())
        self._lanes = [lane for lane in self._lanes if lane.model is self.model or lane.running]
        self._lane(self.model)
        return any(lane.running for lane in self._lanes)

    def _sweep(self, now_s: float) -> None:
        for sequence in self.queued:
            sequence.give_up(now_s)
        for sequence in self._queue.remove(lambda sequence: sequence.done):
            self._meters.finished(sequence.ended)
        over = [sequence for sequence in self._displaced if sequence.done]
        self._displaced = [sequence for sequence in self._displaced if not sequence.done]
        for sequence in over:
            self._over(sequence)

    def _has_room(self) -> bool:
        return len(self.running) < self._limits.running and not any(lane.tight and lane.running for lane in self._lanes)

    def _start(self, sequence: RunningSequence) -> None:
        error = None
        if sequence.model in self._gone:
            try:
                sequence.rebind(self.model)
            except EbbflowError as unfit:
                error = unfit
        if error := error or self._lane(sequence.model).admit(sequence):
            sequence.fail(error)
            self._over(sequence)

    def _lane(self, model: Model) -> Lane:
        for lane in self._lanes:
            if lane.model is model:
                return lane
        self._lanes.append(Lane(model, self._limits))
        return self._lanes[-1]

    def step(self, now_s: float) -> list[StepReport]:
        """Takes one step on every engine that has something to do."""
        return [lane.step(now_s) for lane in self._lanes if lane.running]

    def settle(self, reports: list[StepReport], now_s: float) -> int:
        """Counts what steps did, and lets those wait again that had to give up their place.

        Returns:
            How many tokens of answers came.
        """
        tokens = 0
        for report in reports:
            for fed in report.fed:
                # An answer's token counts twice, when it is chosen and when the engine sees it: the source's weights.
                self._queue.charge(fed.sequence.user, fed.seen_tokens + fed.answer_tokens)
                tokens += fed.answer_tokens
            self._displaced[:0] = reversed(report.displaced)
            for sequence in report.ended:
                self._learn(now_s - sequence.arrived_s)
                self._over(sequence)
        if tokens:
            self._meters.tokens(tokens)
        return tokens

    def _learn(self, request_s: float) -> None:
        self._request_s += (_REQUEST_WEIGHT if self._request_s else 1.0) * (request_s - self._request_s)

    def _over(self, sequence: RunningSequence) -> None:
        self._queue.left(sequence.user)
        self._meters.finished(sequence.ended)

    def fail_all(self, error: EbbflowError) -> None:
        """Ends everything with an error."""
        for lane in self._lanes:
            lane.fail_all(error)
        for sequence in self.queued:
            sequence.fail(error)
        self._queue.remove(lambda _: True)
        self._displaced = []
