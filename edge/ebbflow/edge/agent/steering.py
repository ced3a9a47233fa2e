"""Brings about what the governor of one student decides, beside running requests."""

import datetime as dt
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Protocol

import structlog

from ebbflow.api.v1 import inference_pb2 as pb
from ebbflow.common.codes import artefact
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.machine import MachineReading
from ebbflow.edge.agent.profile import PRECISIONS
from ebbflow.edge.engine.base import Engine, Prepared
from ebbflow.edge.engine.governor import Governor, Policy
from ebbflow.edge.engine.strain import Reading
from ebbflow.edge.serving.faults import place_of
from ebbflow.edge.serving.load import Load
from ebbflow.edge.serving.model import Model

log = structlog.get_logger(__name__)


class EngineThread(Protocol):
    """What steering needs of a batcher."""

    def between_steps(self, action: Callable[[Engine], None]) -> "Future[None]":
        """Does something to the engine on its own thread."""


class Steering:
    """One student's governor and its engine. One thread at a time."""

    def __init__(
        self, model: Model, batcher: EngineThread, policy: Policy, executor: Executor, now: Callable[[], dt.datetime]
    ) -> None:
        """Begins with what computes.

        Args:
            model: the release that serves.
            batcher: owns its engine.
            policy: what may be chosen.
            executor: makes other precisions ready, which takes a while.
            now: the time for the status, aware.
        """
        self.model, self._batcher, self._executor, self._now = model, batcher, executor, now
        self._governor = Governor(policy)
        self._reason = "nothing is known of the load yet"
        self._change_time = now()
        self._preparing: tuple[str, Future[Prepared]] | None = None
        self._acting: Future[None] | None = None
        self._ended = False
        self._threads = model.engine.threads
        engine = model.engine
        sizes_bytes = {name: artefact.size_bytes(engine.config, name, engine.kept_bf16) for name in artefact.PRECISIONS}
        share = engine.memory().weights_bytes / sizes_bytes[engine.precision]
        self._weights_bytes: dict[str, int] = {
            name: round(share * sizes_bytes[name]) for name in artefact.PRECISIONS if name in policy.offered
        }

    @property
    def governs(self) -> bool:
        """Whether there is anything to choose."""
        return len(self._governor.policy.offered) > 1 or self._governor.policy.max_threads > 1

    def steer(self, load: Load, machine: MachineReading, now_s: float) -> None:
        """Decides by what is so now, and takes the next step towards it; returns at once.

        Args:
            load: of this student.
            machine: the device, with the cores that are free for this student.
            now_s: on a clock that never goes back.
        """
        if self._acting is not None and not self._acting.done():  # a long step is under way
            return
        decision = self._governor.decide(self._reading(load, machine), now_s)
        if (decision.precision, decision.threads) == self._present and self._preparing is None:
            self._reason = decision.reason
        self._bring_about(decision.precision, decision.reason, now_s)
        self._fit_threads(decision.threads, decision.reason, machine.cores)

    def status(self) -> pb.Governor | None:
        """Returns what was decided and why; None if there is nothing to choose."""
        if not self.governs:
            return None
        policy, engine = self._governor.policy, self.model.engine
        offered = [PRECISIONS[precision] for precision in policy.offered]
        said = pb.Governor(offered=offered, threads=engine.threads, pinned=bool(policy.pin), reason=self._reason)
        said.change_time.FromDatetime(self._change_time)
        return said

    def end(self) -> None:
        """Changes nothing any more; the engine may have gone to another release."""
        self._ended = True
        self._drop()

    def _drop(self) -> None:
        if self._preparing:
            _, future = self._preparing
            self._preparing = None
            future.cancel()
            future.add_done_callback(_discard)

    @property
    def _present(self) -> tuple[str, int]:
        return self.model.engine.precision, self.model.engine.threads

    def _reading(self, load: Load, machine: MachineReading) -> Reading:
        engine = self.model.engine
        heat, battery = machine.heat, machine.battery
        return Reading(
            precision=engine.precision,
            threads=self._threads,
            cores=machine.cores,
            free_cores=machine.free_cores,
            running=load.running,
            queued=load.queued,
            tokens_per_s=load.tokens_per_s,
            first_token_s=load.first_token_s,
            weights_bytes=self._weights_bytes,
            cache_bytes=engine.memory().cache_used_bytes,
            memory_total_bytes=machine.memory_total_bytes,
            memory_available_bytes=machine.memory_available_bytes,
            temperature_c=heat.temperature_c if heat else None,
            hot_c=heat.hot_c if heat else 80.0,
            discharging=battery.discharging if battery else False,
            battery_percent=battery.percent if battery else None,
        )

    def _fit_threads(self, threads: int, reason: str, cores: float) -> None:
        """Sets the threads that were decided; one less while a precision is made ready, which takes a core."""
        self._threads = count = threads
        if self._preparing and threads > 1 and threads >= int(cores):
            count, reason = threads - 1, f"{self._preparing[0]} is being made ready on the core of one thread"
        if count == self.model.engine.threads:
            return

        def act(engine: Engine) -> None:
            if engine is self.model.engine and not self._ended:
                engine.threads = count

        self._act(act, reason, threads=count)

    def _bring_about(self, precision: str, reason: str, now_s: float) -> None:
        if self._preparing and self._preparing[0] != precision:
            self._drop()
        if precision == self.model.engine.precision:
            return
        if self._preparing is None:
            self._preparing = (precision, self._executor.submit(self.model.engine.prepare, precision))
        elif self._preparing[1].done():
            future, self._preparing = self._preparing[1], None
            self._switch(precision, future, reason, now_s)

    def _switch(self, precision: str, future: "Future[Prepared]", reason: str, now_s: float) -> None:
        try:
            prepared = future.result()
        except Exception as error:  # noqa: BLE001 - whatever an engine trips over, it goes on as it is
            why, facts = _told(error)
            log.warning("precision_not_ready", student=self.model.student, precision=precision, **facts)
            self._governor.refused(precision, why, now_s)
            return
        self._weights_bytes[precision] = prepared.bytes

        def act(engine: Engine) -> None:
            try:
                if engine is self.model.engine and not self._ended:
                    engine.switch(prepared)
            finally:
                prepared.discard()

        self._act(act, reason, precision=precision)

    def _act(self, action: Callable[[Engine], None], why: str, **what: object) -> None:
        self._acting = self._batcher.between_steps(action)
        self._acting.add_done_callback(self._acted)
        self._reason, self._change_time = why, self._now()
        log.info("governed", student=self.model.student, why=why, **what)

    def _acted(self, future: "Future[None]") -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            log.error("not_governed", student=self.model.student, **_told(error)[1])


def _told(error: BaseException) -> tuple[str, dict[str, str]]:
    """Returns what a user may hear of a failure, and what the log says of it."""
    if isinstance(error, MemoryError) or (isinstance(error, EbbflowError) and error.reason is Reason.OUT_OF_MEMORY):
        return "there was not enough memory to make it ready", {"reason": Reason.OUT_OF_MEMORY.name}
    if isinstance(error, EbbflowError):
        return f"making it ready failed with {error.reason.name}", {"reason": error.reason.name}
    return "making it ready failed", {key: str(value) for key, value in place_of(error).items()}


def _discard(future: "Future[Prepared]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().discard()
