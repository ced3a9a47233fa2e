"""Our native engine on an artefact, as the agent loads it; run by `speed.session`."""

from collections.abc import Sequence
from pathlib import Path

from speed.session import Session, main
from speed.shapes import CONTEXT_TOKENS, Shape

from ebbflow.edge.engine.base import StepEntry
from ebbflow.edge.engine.load import load_engine


class Ours:
    """One engine; its slots are the sequences."""

    def __init__(self, shape: Shape, path: Path, threads: int) -> None:
        self.engine = load_engine(path, prefer="native", threads=threads, context_tokens=CONTEXT_TOKENS)
        if self.engine.config.vocab_size != shape.vocab_size:
            raise ValueError(f"{path} is of another shape")
        self._slots: list[int] = []
        self._tokens: list[int] = []

    @property
    def weights_bytes(self) -> int:
        """What a token reads: every matrix once."""
        return self.engine.memory().weights_bytes

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """All prompts in one step, without the prefix cache."""
        self.forget()
        self._slots = [self.engine.open() for _ in prompts]
        self._run(prompts)

    def next(self) -> None:
        """One step for all sequences."""
        self._run([[token] for token in self._tokens])

    def forget(self) -> None:
        """Closes all slots."""
        for slot in self._slots:
            self.engine.close(slot)
        self._slots = []

    def close(self) -> None:
        """Lets go of the engine."""
        del self.engine

    def _run(self, tokens: Sequence[Sequence[int]]) -> None:
        logits = self.engine.step([StepEntry(slot, ids) for slot, ids in zip(self._slots, tokens, strict=True)])
        self._tokens = [int(row_V.argmax()) for row_V in logits]


def replace(session: Session, path: Path) -> None:
    """Swaps in place, the mode of small devices; beside running requests nothing waits at all."""
    assert isinstance(session, Ours)
    session.forget()
    session.engine.replace(path)


if __name__ == "__main__":
    main(Ours, replace)
