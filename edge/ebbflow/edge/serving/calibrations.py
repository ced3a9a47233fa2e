"""The confidence of each release that serves, fitted beside running requests."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import structlog

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.batcher import Batcher
from ebbflow.edge.serving.confidence import Calibration, Observation, fit, observe
from ebbflow.edge.serving.events import Events
from ebbflow.edge.serving.faults import place_of
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sequences import RunningSequence, Scored, Sink
from ebbflow.edge.serving.vectors import Floats

log = structlog.get_logger(__name__)

Texts = Callable[[str], Sequence[Sequence[int]]]
"""Tokens of texts that a student, by its name, has not learnt from; may block."""


class Calibrations:
    """Fits each release's confidence once for each precision, when the first answer needs it."""

    def __init__(self, texts: Texts) -> None:
        """Takes where texts come from."""
        self._texts = texts
        self._known: dict[str, tuple[str, dict[str, asyncio.Future[Calibration]]]] = {}

    async def of(self, batcher: Batcher) -> Calibration:
        """Returns the curve of the release and precision that serve; the student is taken at its word without one."""
        model = batcher.model
        release, curves = self._known.get(model.student, ("", {}))
        if release != model.release:
            curves = {}
            self._known[model.student] = model.release, curves
        if (precision := model.engine.precision) not in curves:
            curves[precision] = asyncio.ensure_future(self._fit(batcher, curves, precision))
        return await asyncio.shield(curves[precision])

    async def _fit(
        self, batcher: Batcher, curves: dict[str, asyncio.Future[Calibration]], precision: str
    ) -> Calibration:
        student = batcher.model.student
        try:
            texts = await asyncio.to_thread(self._texts, student)
            found = fit([each for token_ids in texts for each in await read(batcher, token_ids)])
        except EbbflowError as error:
            log.warning("confidence_not_calibrated", student=student, reason=error.reason.name)
        except Exception as error:  # noqa: BLE001 - an answer is not lost for it
            log.error("confidence_not_calibrated", student=student, **place_of(error))
        else:
            log.info("confidence_calibrated", student=student, tokens=found.tokens, slope=f"{found.slope:.2f}")
            return found
        curves.pop(precision, None)  # the next answer tries again
        return Calibration()


async def read(batcher: Batcher, token_ids: Sequence[int]) -> list[Observation]:
    """Lets the student that serves read a text, in its turn beside the requests of users.

    Raises:
        EbbflowError: QUEUE_FULL, AGENT_STOPPING, or what the engine says; STATE_CONFLICT if another release takes over
            before the text's turn.
    """
    events = Events()
    reading = _Reading(batcher.model, token_ids, events.put)
    batcher.submit(reading)
    await events.get()
    return reading.observations


class _Reading(RunningSequence):
    """A text being read; see `RunningSequence`."""

    want: Literal["last", "all"] = "all"

    def __init__(self, model: Model, token_ids: Sequence[int], sink: Sink) -> None:
        super().__init__(model, token_ids, sink)
        self.observations: list[Observation] = []

    def rebind(self, model: Model) -> None:
        """Refuses: what is known of one release says nothing of another."""
        raise EbbflowError(Reason.STATE_CONFLICT, f"{model.release} has taken over")

    def restart(self) -> None:
        """Reads everything again."""
        super().restart()
        self.observations = []

    def accept(self, logits: Floats) -> int:
        """Compares what is likeliest with the tokens that follow those just seen."""
        first = self._seen - len(logits) + 1
        targets_T = np.asarray(self._tokens[first : self._seen + 1], np.int64)
        if len(targets_T):
            self.observations.append(observe(logits[: len(targets_T)], targets_T))
        if not self.waiting_tokens:
            self._end(Scored([]), "scored")
        return 0
