"""One engine and what runs on it, step by step. No threads and no clock."""

from collections.abc import Callable
from dataclasses import dataclass, field
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

# Logits of a whole vocabulary for each token are large: so many rows at a time are enough to keep the engine busy.
_MOST_ROWS = 32


@dataclass(frozen=True)
class Limits:
    """How much one student takes on at a time."""

    running: int = 8
    """Sequences in one batch; past eight a step takes longer for everyone."""
    queued: int = 64
    """Sequences that may wait for a place."""
    prompt_tokens: int = 32
    """Prompt tokens in one step beside answers, so that a long prompt does not hold them up."""
    prompt_tokens_alone: int = 128
    """Prompt tokens in one step when no answer is under way."""
    request_s: float = 600.0
    """Seconds after which a request ends that has not ended by itself."""


@dataclass(frozen=True)
class Fed:
    """What one step did for one sequence."""

    sequence: RunningSequence
    seen_tokens: int
    """That the engine computed."""
    answer_tokens: int
    """That were chosen."""


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    fed: list[Fed] = field(default_factory=list)
    ended: list[RunningSequence] = field(default_factory=list)
    displaced: list[RunningSequence] = field(default_factory=list)
    """Those that had no memory beside the others and must begin again, newest first."""


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
    """Continuous batching on one engine: sequences come in and go out between any two steps.

    Attributes:
        tight: memory has run short, and nobody has ended since: one alone may come in, else they would be displaced.
    """

    def __init__(self, model: Model, limits: Limits) -> None:
        """Starts empty."""
        self.model = model
        self.tight = False
        self._crowded = False  # somebody who runs has not been alone all the time
        self._limits = limits
        self._running: dict[int, RunningSequence] = {}  # by the engine's slot, oldest first

    @property
    def running(self) -> list[RunningSequence]:
        """The sequences in the batch, oldest first."""
        return list(self._running.values())

    def admit(self, sequence: RunningSequence) -> EbbflowError | None:
        """Takes a sequence into the batch, with what is cached of its prompt; returns why it could not."""
        error, slot = _attempt(self.model.engine.open)
        if slot is None:
            return error
        error, known = _attempt(partial(self._known, slot, sequence))
        if known is None:
            _attempt(partial(self.model.engine.close, slot))
            return error
        sequence.skip(known)
        self._crowded = bool(self._running)
        self._running[slot] = sequence
        return None

    def _known(self, slot: int, sequence: RunningSequence) -> int:
        """Who wants the logits of every token must have every token computed."""
        return self.model.engine.reuse(slot, sequence.token_ids) if sequence.want == "last" else 0

    def step(self, now_s: float) -> StepReport:
        """Takes one step of the engine.

        An error of the engine ends the sequences that were in the step, and nothing else. Where only memory is short,
        the sequence that came last gives its place up, and the others try again in the next step.
        """
        report = StepReport()
        self._let_out(report, now_s)
        if shares := self._plan():
            error, results = _attempt(lambda: self.model.engine.step([share.entry for share in shares]))
            if error:
                self._refuse(shares, error, report)
            for share, logits in zip(shares, results or (), strict=False):
                error, chosen = _attempt(partial(share.sequence.accept, logits))
                if error:
                    share.sequence.fail(error)
                report.fed.append(Fed(share.sequence, len(share.token_ids), chosen or 0))
            self._let_out(report, now_s)
        return report

    def fail_all(self, error: EbbflowError) -> None:
        """Ends everything with an error."""
        for slot, sequence in self._running.items():
            sequence.fail(error)
            _attempt(partial(self.model.engine.close, slot))
        self._running = {}

    def _let_out(self, report: StepReport, now_s: float) -> None:
        for slot, sequence in list(self._running.items()):
            sequence.give_up(now_s)
            if sequence.done:
                self._leave(slot)
                report.ended.append(sequence)
                self.tight = False

    def _leave(self, slot: int) -> None:
        del self._running[slot]
        _attempt(partial(self.model.engine.close, slot))

    def _plan(self) -> list[_Share]:
        """Chooses each sequence's tokens for one step: answers always, prompts within the budget."""
        portions = self._portions()
        return [
            _Share(slot, sequence, sequence.take(portions[slot]))
            for slot, sequence in self._running.items()
            if portions[slot]
        ]

    def _portions(self) -> dict[int, int]:
        """How many tokens each slot brings.

        Of the budget for prompts the oldest has one half, so that it ends some time, and the others have the rest, the
        shortest first, so that a short prompt does not wait for a long one.
        """
        waiting = {slot: sequence.waiting_tokens for slot, sequence in self._running.items()}
        prompts = [slot for slot, tokens in waiting.items() if tokens > 1]
        answering = len(prompts) < len(waiting)
        budget = self._limits.prompt_tokens if answering else self._limits.prompt_tokens_alone
        portions = {slot: min(1, tokens) for slot, tokens in waiting.items()} | dict.fromkeys(prompts, 0)
        for slot, most in [
            *((slot, (budget + 1) // 2) for slot in prompts[:1]),
            *((slot, budget) for slot in sorted(prompts, key=lambda slot: waiting[slot])),
        ]:
            rows = _MOST_ROWS if self._running[slot].want == "all" else most
            more = max(0, min(most, budget, rows - portions[slot], waiting[slot] - portions[slot]))
            portions[slot] += more
            budget -= more
        return portions

    def _refuse(self, shares: list[_Share], error: EbbflowError, report: StepReport) -> None:
        """What others have taken may still be held where they have gone: who is left begins again, alone."""
        if error.reason is not Reason.OUT_OF_MEMORY or not self._crowded:
            for share in shares:
                share.sequence.fail(error)
            return
        for share in shares:
            share.sequence.put_back(len(share.token_ids))
        slot = next(reversed(self._running))
        newest = self._running[slot]
        self._leave(slot)
        newest.restart()
        report.displaced.append(newest)
        self.tight = True


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
