"""What runs in a batch: texts being continued and texts being scored. No threads and no clock.

A sequence hands out the tokens that the engine shall see next and takes the logits that come back; what it finds out it
tells its `sink`, which is called on the thread that runs the engine and must not block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.loss import token_losses
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.sampling import Floats, Sampler, Sampling
from ebbflow.edge.serving.text import StopText, TokenText


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
        cancelled: set by anyone, from any thread, when nobody waits for the answer any more.
        done: nothing is left to do.
    """

    want: Literal["last", "all"] = "last"

    def __init__(self, token_ids: Sequence[int], sink: Sink) -> None:
        """Takes the first tokens."""
        self._pending = list(token_ids)
        self._sink = sink
        self.cancelled = False
        self.done = False

    @property
    def waiting_tokens(self) -> int:
        """How many tokens the engine has yet to see."""
        return len(self._pending)

    def take(self, limit: int) -> list[int]:
        """Returns the next tokens for the engine, at most `limit`."""
        taken, self._pending = self._pending[:limit], self._pending[limit:]
        return taken

    def put_back(self, token_ids: Sequence[int]) -> None:
        """Takes tokens back that the engine could not see after all."""
        self._pending[:0] = token_ids

    @abstractmethod
    def accept(self, logits: Floats) -> None:
        """Takes what the engine said of the tokens taken last: [V] or, when all are wanted, [T, V]."""

    def fail(self, error: EbbflowError) -> None:
        """Ends the sequence with an error."""
        self._end(Failed(error))

    def _end(self, event: Event) -> None:
        self.done = True
        self._sink(event)


class Generation(RunningSequence):
    """A text being continued."""

    def __init__(self, model: Model, prompt: str, options: Sampling, sink: Sink) -> None:
        """Tokenises the prompt.

        Raises:
            EbbflowError: CONTEXT_TOO_LONG if the prompt leaves no room for an answer; INVALID_REQUEST if there is
                nothing to continue or `max_tokens` exceeds what the student can ever hold.
        """
        prompt_ids = prompt_tokens(model, prompt, room=1)
        context_tokens = model.engine.context_tokens
        if options.max_tokens > context_tokens:
            message = f"max_tokens must be at most the student's context of {context_tokens} tokens"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="max_tokens", context_tokens=context_tokens)
        super().__init__(prompt_ids, sink)
        self._prompt_tokens = len(prompt_ids)
        self._most_tokens = min(options.max_tokens, context_tokens - len(prompt_ids))
        self._tokens = 0
        self._ends = {model.tokenizer.eos_id, model.engine.config.eos_token_id}
        self._sampler = Sampler(options)
        self._text = TokenText(model.tokenizer.decode)
        self._stop = StopText(options.stop)

    def accept(self, logits: Floats) -> None:
        """Chooses the next token once the whole prompt has been seen."""
        if not self._pending:
            token = self._sampler.pick(logits)
            self._tokens += 1
            if reason := self._add(token):
                self._finish(reason)
            else:
                self._pending = [token]

    def _add(self, token: int) -> Finish | None:
        """Adds a token to the answer; says why the answer ends, if it does."""
        if token in self._ends:
            return Finish.STOP
        self._say(self._stop.push(self._text.push(token)))
        if self._stop.stopped:
            return Finish.STOP
        return Finish.LENGTH if self._tokens >= self._most_tokens else None

    def _say(self, text: str) -> None:
        if text:
            self._sink(Piece(text))

    def _finish(self, reason: Finish) -> None:
        """Lets out what is held back, unless a stop text turns up in it."""
        if not self._stop.stopped:
            self._say(self._stop.push(self._text.finish()) + self._stop.finish())
        reason = Finish.STOP if self._stop.stopped else reason
        self._end(Finished(reason, self._prompt_tokens, self._tokens))


class Scoring(RunningSequence):
    """A text whose tokens are being scored."""

    want: Literal["last", "all"] = "all"

    def __init__(self, model: Model, text: str, sink: Sink) -> None:
        """Tokenises the text.

        Raises:
            EbbflowError: CONTEXT_TOO_LONG if the text is longer than the student's context.
        """
        token_ids = prompt_tokens(model, text, room=0)
        super().__init__(token_ids, sink)
        self._targets = token_ids[1:]
        self._log_probs: list[float] = []

    def accept(self, logits: Floats) -> None:
        """Scores the tokens that follow those just seen."""
        start = len(self._log_probs)
        targets_T = np.asarray(self._targets[start : start + len(logits)], np.int64)
        if len(targets_T):
            self._log_probs += (-token_losses(logits[: len(targets_T)], targets_T)).tolist()
        if not self._pending:
            self._end(Scored(self._log_probs))


def prompt_tokens(model: Model, text: str, room: int) -> list[int]:
    """Returns the text's tokens, with the beginning-of-text token where the student knows one.

    Args:
        model: whose tokenizer and context count.
        text: what to tokenise.
        room: tokens that must stay free.

    Raises:
        EbbflowError: CONTEXT_TOO_LONG or, if no token comes out, INVALID_REQUEST.
    """
    token_ids = model.tokenizer.encode(text, bos=model.tokenizer.bos_id is not None)
    context_tokens = model.engine.context_tokens
    if not token_ids:
        raise EbbflowError(Reason.INVALID_REQUEST, "the prompt is empty", field="prompt")
    if len(token_ids) + room > context_tokens:
        message = f"the prompt has {len(token_ids)} tokens; the student's context holds {context_tokens}"
        raise EbbflowError(Reason.CONTEXT_TOO_LONG, message, tokens=len(token_ids), context_tokens=context_tokens)
    return token_ids
