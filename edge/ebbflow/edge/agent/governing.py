"""The loop of the governor: looks at the device and at every student, and steers.

It runs beside serving: the device is read and precisions are made ready in threads, and only the change itself happens
between two steps of the engine.
"""

import asyncio
import datetime as dt
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.common.errors import EbbflowError
from ebbflow.edge.agent.machine import Machine
from ebbflow.edge.agent.profile import cores_of
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.agent.steering import Steering
from ebbflow.edge.engine.governor import Policy
from ebbflow.edge.engine.strain import Rules
from ebbflow.edge.serving.batcher import Batcher
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.load import FIRST_TOKEN_WINDOW_S, Load
from ebbflow.edge.serving.model import Model

BUSY_S = 0.5
"""Seconds between looks while something is asked."""
IDLE_S = 2.0
_MS = 1e3


class Governing:
    """All governors of an agent. Belongs to one event loop."""

    def __init__(
        self,
        hub: Hub,
        settings: AgentSettings,
        memory_limit_bytes: int,
        now: Callable[[], dt.datetime],
        machine: Machine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes what serves, what the operator allows, and the time, which is aware.

        Args:
            hub: the students.
            settings: pin, latency goal, dwell time, precisions and requests at a time.
            memory_limit_bytes: most bytes of one student's weights and caches together.
            now: for the status.
            machine: the device; None for this one.
            clock: seconds that never go back.
        """
        self._hub, self._settings, self._limit_bytes, self._now = hub, settings, memory_limit_bytes, now
        self._machine, self._clock = machine or Machine(), clock
        self._steerings: dict[str, Steering] = {}
        self._executor = ThreadPoolExecutor(1, "prepare precision")

    async def look(self) -> float:
        """Reads, decides and acts once; returns the seconds until the next look."""
        now_s, found = self._clock(), self._students()
        if not found and not self._steerings:
            return IDLE_S
        machine = await asyncio.to_thread(self._machine.read, now_s)
        loads = {model.student: batcher.load() for model, batcher in found}
        busy = sum(_is_busy(load) for load in loads.values())
        for student in set(self._steerings) - set(loads):
            self._steerings.pop(student).end()
        for model, batcher in found:
            load = loads[model.student]
            # Two engines at work share the cores that are free.
            sharing = max(1, busy if _is_busy(load) else busy + 1)
            own = replace(machine, free_cores=machine.free_cores / sharing)
            self._steering(model, batcher).steer(load, own, now_s)
        return BUSY_S if busy else IDLE_S

    def status(self, student: str) -> pb.Governor | None:
        """Returns what the governor of a student such as "students/faq" has decided; None if there is none."""
        steering = self._steerings.get(student)
        return steering.status() if steering else None

    def close(self) -> None:
        """Lets go of everything; what is being made ready ends by itself."""
        for steering in self._steerings.values():
            steering.end()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _students(self) -> list[tuple[Model, Batcher]]:
        found = []
        for model in self._hub.models():
            try:
                found.append((model, self._hub.batcher(model.student)))
            except EbbflowError:  # it was removed meanwhile
                continue
        return found

    def _steering(self, model: Model, batcher: Batcher) -> Steering:
        """The steering of a release that serves; a new one for a new release."""
        steering = self._steerings.get(model.student)
        if steering is None or steering.model is not model:
            if steering:
                steering.end()
            steering = Steering(model, batcher, self._policy(model), self._executor, self._now)
            self._steerings[model.student] = steering
        return steering

    def _policy(self, model: Model) -> Policy:
        settings = self._settings
        rules = Rules(
            latency_goal_s=settings.latency_goal_ms / _MS or None,
            memory_limit_bytes=self._limit_bytes,
            capacity=settings.running,
            first_token_window_s=FIRST_TOKEN_WINDOW_S,
        )
        pin = "" if settings.precision_pin == "auto" else settings.precision_pin
        return Policy(
            offered=offered(model, settings.precisions),
            max_threads=min(model.engine.max_threads, cores_of(settings)),
            pin=pin,
            dwell_s=settings.governor_dwell_s,
            rules=rules,
        )


def offered(model: Model, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the precisions to choose from, best first.

    The one that was installed, and of those that the engine can make of it the ones whose quality the release's gate
    has measured and that the operator allows.
    """
    engine = model.engine
    gated = set(model.variants) & set(allowed)
    return tuple(name for name in engine.offered if name == engine.precision or name in gated)


def _is_busy(load: Load) -> bool:
    return load.running > 0 or load.tokens_per_s > 0
