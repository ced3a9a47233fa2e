"""The students that this device serves, by name."""

import threading
from collections.abc import Sequence

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.batcher import Batcher, Embedding
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.model import Model


class Hub:
    """One batcher for each student. Its methods may be called from any thread."""

    def __init__(self, limits: Limits) -> None:
        """Starts without students."""
        self._limits = limits
        self._lock = threading.Lock()
        self._batchers: dict[str, Batcher] = {}

    def swap(self, model: Model) -> None:
        """Lets a release answer for its student from now on; what runs finishes on the release it began with."""
        with self._lock:
            if batcher := self._batchers.get(model.student):
                batcher.swap(model)
            else:
                self._batchers[model.student] = Batcher(model, self._limits)

    def remove(self, student: str) -> None:
        """Stops serving a student once its running requests are answered."""
        with self._lock:
            if batcher := self._batchers.pop(student, None):
                batcher.retire()

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

    def embed(self, student: str, texts: Sequence[str]) -> list[Embedding]:
        """Embeds texts between the steps of running requests; blocks until it is done.

        Text beyond the student's context is not looked at.

        Raises:
            EbbflowError: NO_MODEL or MODEL_NOT_FOUND; AGENT_STOPPING.
        """
        batcher = self.batcher(student)
        model = batcher.model
        encode, bos = model.tokenizer.encode, model.tokenizer.bos_id is not None
        tokens = [encode(text, bos=bos)[: model.engine.context_tokens] for text in texts]
        futures = [batcher.embed(token_ids) for token_ids in tokens]
        return [future.result() for future in futures]

    def stop(self) -> None:
        """Ends all threads; whoever still waits hears AGENT_STOPPING."""
        with self._lock:
            batchers, self._batchers = list(self._batchers.values()), {}
        for batcher in batchers:
            batcher.stop()
