"""What runs in a batch. No threads and no clock.

A sequence hands out the tokens that the engine shall see next and takes the logits that come back; what it finds out it
tells its `sink`, which is called on the thread that runs the engine and must not block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.serving.chances import TokenChance
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.vectors import Floats


class Finish(Enum):
    """Why an answer ended."""

    STOP = "stop"
    """The student or a stop text ended it."""
    LENGTH = "length"
    """It reached its longest length."""


@dataclass(frozen=True)
class Piece:
    """Part of an answer."""

    text: str
    chances: tuple[TokenChance, ...] = ()
    """The tokens whose text this is, where log-probabilities were asked for."""

    @classmethod
    def joined(cls, pieces: "Sequence[Piece]") -> "Piece":
        """Makes one of several that follow each other."""
        return cls("".join(piece.text for piece in pieces), tuple(c for piece in pieces for c in piece.chances))


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: Finish
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Scored:
    """The natural logarithm of each token's probability after the first."""

    token_log_probs: list[float]


@dataclass(frozen=True)
class Failed:
    """Nothing more will come."""

    error: EbbflowError


Event = Piece | Finished | Scored | Failed
Sink = Callable[[Event], None]


class RunningSequence(ABC):
    """Tokens on their way through an engine.

    Attributes:
        want: which logits the engine returns.
        model: what answers.
        user: whose turn it uses, in the application's words; "" for nobody in particular.
        arrived_s: when it was asked for, by the batcher's clock.
        deadline_s: when nobody waits for it any more, by the same clock; None for never.
        cancelled: set by anyone, from any thread, when nobody waits for the answer any more.
        ended: why it ended, as a word for meters; empty while it has not.
    """

    want: Literal["last", "all"] = "last"

    def __init__(self, model: Model, token_ids: Sequence[int], sink: Sink, user: str = "") -> None:
        """Takes the first tokens."""
        self.model, self.user = model, user
        self.arrived_s = 0.0
        self.deadline_s: float | None = None
        self.cancelled = False
        self.ended = ""
        self._begun = False
        self._tokens = list(token_ids)
        self._seen = 0  # of these, by the engine
        self._sink = sink

    @property
    def done(self) -> bool:
        """Nothing is left to do."""
        return bool(self.ended)

    @property
    def token_ids(self) -> Sequence[int]:
        """Everything that the engine must have seen before it says something new."""
        return self._tokens

    @property
    def waiting_tokens(self) -> int:
        """How many tokens the engine has yet to see."""
        return len(self._tokens) - self._seen

    def take(self, limit: int) -> list[int]:
        """Returns the next tokens for the engine, at most `limit`."""
        taken = self._tokens[self._seen : self._seen + limit]
        self._seen += len(taken)
        return taken

    def put_back(self, count: int) -> None:
        """Takes back the last `count` tokens, which the engine could not see after all."""
        self._seen -= count

    def skip(self, count: int) -> None:
        """The engine knows the first `count` tokens already."""
        self._seen = count

    def restart(self) -> None:
        """The engine has forgotten the sequence: it must see everything again. What was told stays told."""
        self._seen = 0

    @abstractmethod
    def accept(self, logits: Floats) -> int:
        """Takes what the engine said of the tokens taken last: [V] or, when all are wanted, [T, V].

        Returns:
            How many tokens of an answer came of it.
        """

    @abstractmethod
    def rebind(self, model: Model) -> None:
        """Lets another release answer, before the engine has seen anything.

        Raises:
            EbbflowError: what making the sequence for that release raises.
        """

    def begin(self) -> bool:
        """Notes that the first token of the answer has come; says whether that is new."""
        begun, self._begun = self._begun, True
        return not begun

    def give_up(self, now_s: float) -> None:
        """Ends the sequence if nobody waits for it any more."""
        if self.cancelled and not self.done:
            self.ended = "cancelled"
        elif self.deadline_s is not None and now_s >= self.deadline_s and not self.done:
            self.fail(EbbflowError(Reason.DEADLINE_EXCEEDED, "the time for this request is over"))

    def fail(self, error: EbbflowError) -> None:
        """Ends the sequence with an error."""
        self._end(Failed(error), error.reason.name.lower())

    def _end(self, event: Event, ended: str) -> None:
        self.ended = ended
        self._sink(event)
