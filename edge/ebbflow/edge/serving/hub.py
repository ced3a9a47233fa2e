"""The students that this device serves, by name."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.batcher import Batcher
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.meters import MakeMeters, no_meters
from ebbflow.edge.serving.model import Model


class Hub:
    """One batcher for each student. Its methods may be called from any thread."""

    def __init__(self, limits: Limits, meters: MakeMeters = no_meters) -> None:
        """Starts without students.

        Args:
            limits: of each student.
            meters: gives the meters of a student; asked once for each that begins to serve.
        """
        self._limits, self._meters = limits, meters
        self._lock = threading.Lock()
        self._batchers: dict[str, Batcher] = {}

    def swap(self, model: Model, *, instead: bool = False) -> None:
        """Lets a release answer for its student from now on; what runs finishes on the release it began with.

        Args:
            model: the release.
            instead: within `hold` only: the old one can answer nothing more, so that this one answers what waits, too.
                So it is in any case where both have the same engine.
        """
        with self._lock:
            if batcher := self._batchers.get(model.student):
                batcher.swap(model, instead=instead)
            else:
                self._batchers[model.student] = Batcher(model, self._limits, self._meters(model.student))

    def remove(self, student: str) -> None:
        """Stops serving a student once its running requests are answered."""
        with self._lock:
            if batcher := self._batchers.pop(student, None):
                batcher.retire()

    def abandon(self, student: str) -> None:
        """Stops serving a student whose engine is lost; whoever waits hears AGENT_STOPPING."""
        with self._lock:
            if batcher := self._batchers.pop(student, None):
                batcher.abandon()

    def alive(self) -> bool:
        """Whether every student that serves can answer."""
        with self._lock:
            return all(batcher.alive for batcher in self._batchers.values())

    @contextmanager
    def hold(self, student: str, within_s: float | None = None) -> Iterator[Batcher]:
        """Keeps a student's engine free of requests: they wait in the queue until the block is left.

        What runs is answered to its end first. Inside, `Batcher.between_steps` reaches the engine, and `swap` may say
        that another release has taken it over: what waits is then answered by that one.

        Args:
            student: name as in `batcher`.
            within_s: how long running requests may take; None lets them take as long as they do.

        Raises:
            EbbflowError: as `batcher`; DEADLINE_EXCEEDED if something still runs after `within_s`; AGENT_STOPPING.
        """
        batcher = self.batcher(student)
        batcher.hold(within_s)
        try:
            yield batcher
        finally:
            batcher.release()

    def models(self) -> list[Model]:
        """The releases that serve, by student."""
        with self._lock:
            return [batcher.model for _, batcher in sorted(self._batchers.items())]

    def batcher(self, name: str) -> Batcher:
        """Finds a student by "students/faq", "faq", the name of the release that serves, or "" for the only one.

        Raises:
            EbbflowError: NO_MODEL when nothing is installed yet, MODEL_NOT_FOUND when something else is,
                INVALID_REQUEST when the name is empty and there are several.
        """
        with self._lock:
            batchers = dict(self._batchers)
        if not batchers:
            raise EbbflowError(Reason.NO_MODEL, "no release is installed on this device yet")
        if not name and len(batchers) == 1:
            return next(iter(batchers.values()))
        if not name:
            raise EbbflowError(Reason.INVALID_REQUEST, "several students serve here: name one", field="model")
        for student, batcher in batchers.items():
            if name in {student, student.removeprefix("students/"), batcher.model.release}:
                return batcher
        raise EbbflowError(Reason.MODEL_NOT_FOUND, f"this agent does not serve {name[:200]!r}", model=name[:200])

    def forget_prompts(self) -> None:
        """Lets every engine drop what it has cached of prompts, before its next step; returns at once."""
        with self._lock:
            batchers = list(self._batchers.values())
        for batcher in batchers:
            with suppress(EbbflowError):  # it is stopping, and its engine goes with it
                batcher.between_steps(lambda engine: engine.forget_prompts())

    def stop(self) -> None:
        """Ends all threads; whoever still waits hears AGENT_STOPPING."""
        with self._lock:
            batchers, self._batchers = list(self._batchers.values()), {}
        for batcher in batchers:
            batcher.stop()
