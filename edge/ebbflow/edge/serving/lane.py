"""One engine and everything that runs on it, step by step. No threads and no clock."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import StepEntry
from ebbflow.edge.serving.faults import place_of
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sequences import RunningSequence

T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much one student takes on at a time."""

    running: int = 8
    """Sequences in one batch; past eight a step takes longer for everyone."""
    queued: int = 64
    """Sequences that may wait for a place."""
    prompt_tokens: int = 32
    """Prompt tokens in one step beside answers, so that a long prompt does not hold them up."""
    prompt_tokens_alone: int = 256
    """Prompt tokens in one step when no answer is under way."""


@dataclass(frozen=True)
class _Share:
    """What one sequence brings into a step."""

    slot: int
    sequence: RunningSequence
    token_ids: list[int]

    @property
    def entry(self) -> StepEntry:
        return StepEntry(self.slot, self.token_ids, self.sequence.want)


class Lane:
    """Continuous batching on one engine: every step takes in whoever fits and lets out whoever is done."""

    def __init__(self, model: Model, limits: Limits) -> None:
        """Starts empty."""
        self.model = model
        self._limits = limits
        self._queue: deque[RunningSequence] = deque()
        self._running: dict[int, RunningSequence] = {}  # by the engine's slot, oldest first

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._queue and not self._running

    @property
    def queued(self) -> int:
        """How many wait for a place."""
        return len(self._queue)

    def add(self, sequence: RunningSequence) -> None:
        """Puts a sequence at the end of the queue."""
        self._queue.append(sequence)

    def step(self) -> None:
        """Takes one step of the engine.

        An error of the engine ends the sequences that were in the step, and nothing else. Where only memory is short,
        the sequence that came last ends, and the others try again in the next step.
        """
        self._let_out()
        self._take_in()
        if shares := self._plan():
            error, results = _attempt(lambda: self.model.engine.step([share.entry for share in shares]))
            if error:
                self._refuse(shares, error)
            for share, logits in zip(shares, results or (), strict=False):
                error, _ = _attempt(partial(share.sequence.accept, logits))
                if error:
                    share.sequence.fail(error)
            self._let_out()

    def fail_all(self, error: EbbflowError) -> None:
        """Ends everything with an error."""
        for sequence in [*self._running.values(), *self._queue]:
            sequence.fail(error)
        self._let_out()

    def _let_out(self) -> None:
        for slot, sequence in list(self._running.items()):
            if sequence.done or sequence.cancelled:
                del self._running[slot]
                _attempt(partial(self.model.engine.close, slot))
        if any(sequence.done or sequence.cancelled for sequence in self._queue):
            self._queue = deque(s for s in self._queue if not (s.done or s.cancelled))

    def _take_in(self) -> None:
        while self._queue and len(self._running) < self._limits.running:
            error, slot = _attempt(self.model.engine.open)
            sequence = self._queue.popleft()
            if slot is None:
                sequence.fail(error or EbbflowError(Reason.INTERNAL, "the engine gave no slot"))
            else:
                self._running[slot] = sequence

    def _plan(self) -> list[_Share]:
        """Chooses each sequence's tokens for one step: answers always, prompts within the budget, oldest first."""
        answering = any(sequence.waiting_tokens == 1 for sequence in self._running.values())
        budget = self._limits.prompt_tokens if answering else self._limits.prompt_tokens_alone
        shares = []
        for slot, sequence in self._running.items():
            alone = sequence.waiting_tokens == 1
            limit = 1 if alone else min(budget, sequence.waiting_tokens)
            if limit:
                budget -= 0 if alone else limit
                shares.append(_Share(slot, sequence, sequence.take(limit)))
        return shares

    @staticmethod
    def _refuse(shares: list[_Share], error: EbbflowError) -> None:
        spared = shares[:-1] if error.reason is Reason.OUT_OF_MEMORY else []
        for share in spared:
            share.sequence.put_back(share.token_ids)
        for share in shares[len(spared) :]:
            share.sequence.fail(error)


def _attempt(action: Callable[[], T]) -> tuple[EbbflowError | None, T | None]:
    """Returns what `action` returns, or the error that its callers may hear of."""
    try:
        return None, action()
    except EbbflowError as error:
        return error, None
    except MemoryError:
        return EbbflowError(Reason.OUT_OF_MEMORY, "the device ran out of memory"), None
    except Exception as error:  # noqa: BLE001 - whatever an engine does, its callers hear of it and the others go on
        log.error("engine_failed", **place_of(error))
        return EbbflowError(Reason.INTERNAL, "the engine failed"), None
