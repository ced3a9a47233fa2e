"""A text being continued and a text being scored; see `RunningSequence`."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.loss import token_losses
from ebbflow.edge.serving.chances import TokenChance, chance_of
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.prompts import prompt_tokens
from ebbflow.edge.serving.sampling import Sampler, Sampling
from ebbflow.edge.serving.sequences import Finish, Finished, Piece, RunningSequence, Scored, Sink
from ebbflow.edge.serving.text import StopText, TokenText
from ebbflow.edge.serving.vectors import Floats


class Generation(RunningSequence):
    """A text being continued."""

    def __init__(
        self, model: Model, prompt: str | Sequence[int], options: Sampling, sink: Sink, user: str = ""
    ) -> None:
        """Tokenises the prompt.

        Raises:
            EbbflowError: CONTEXT_TOO_LONG if the prompt leaves no room for an answer; INVALID_REQUEST if there is
                nothing to continue, a token is none of the student's, or `max_tokens` exceeds what it can ever hold.
        """
        self._prompt, self._options = prompt, options
        super().__init__(model, prompt_tokens(model, prompt, room=1), sink, user)
        self._prepare()

    def _prepare(self) -> None:
        model, options = self.model, self._options
        context_tokens, vocabulary = model.engine.context_tokens, model.engine.config.vocab_size
        if options.max_tokens > context_tokens:
            message = f"max_tokens must be at most the student's context of {context_tokens} tokens"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="max_tokens", context_tokens=context_tokens)
        if not all(0 <= token_id < vocabulary for token_id, _ in options.logit_bias):
            message = f"logit_bias names a token outside the vocabulary of {vocabulary}"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="logit_bias")
        self._prompt_tokens = len(self._tokens)
        self._most_tokens = min(options.max_tokens, context_tokens - self._prompt_tokens)
        self._ends = {model.tokenizer.eos_id, model.engine.config.eos_token_id}
        self._sampler = Sampler(options, self._tokens)
        self._answer = _AnswerText(TokenText(model.tokenizer.decode), StopText(options.stop))

    def rebind(self, model: Model) -> None:
        """Tokenises the prompt for another release.

        Raises:
            EbbflowError: as when made.
        """
        self.model, self._seen = model, 0
        self._tokens = prompt_tokens(model, self._prompt, room=1)
        self._prepare()

    def accept(self, logits: Floats) -> int:
        """Chooses the next token once the whole prompt has been seen."""
        if self.waiting_tokens:
            return 0
        token = self._sampler.pick(logits)
        self._tokens.append(token)
        if reason := self._add(token, logits):
            self._finish(reason)
        return 1

    def _add(self, token: int, logits_V: Floats) -> Finish | None:
        """Adds a token to the answer; says why the answer ends, if it does."""
        if token in self._ends:
            return Finish.STOP
        top, token_bytes = self._options.top_log_probs, self.model.tokenizer.token_bytes
        chance = None if top is None else chance_of(token, logits_V, top, token_bytes)
        self._say(self._answer.push(token, chance))
        if self._answer.stopped:
            return Finish.STOP
        return Finish.LENGTH if self._answered >= self._most_tokens else None

    @property
    def _answered(self) -> int:
        return len(self._tokens) - self._prompt_tokens

    def _say(self, piece: Piece | None) -> None:
        if piece:
            self._sink(piece)

    def _finish(self, reason: Finish) -> None:
        """Lets out what is held back, unless a stop text turns up in it."""
        self._say(self._answer.finish())
        reason = Finish.STOP if self._answer.stopped else reason
        self._end(Finished(reason, self._prompt_tokens, self._answered), reason.value)


class _AnswerText:
    """The text of an answer and the chances of its tokens, each let out with the text that it belongs to."""

    def __init__(self, text: TokenText, stop: StopText) -> None:
        self._text, self._stop = text, stop
        self._decoded = 0  # characters that have come from tokens
        self._told = 0  # of these, characters that were let out
        self._held: deque[TokenChance] = deque()

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._stop.stopped

    def push(self, token: int, chance: TokenChance | None) -> Piece | None:
        """Returns what a token lets out."""
        if chance:
            self._held.append(replace(chance, offset=self._decoded))
        text = self._text.push(token)
        self._decoded += len(text)
        return self._out(self._stop.push(text))

    def finish(self) -> Piece | None:
        """Returns the rest, as far as no stop text turns up in it."""
        if self._stop.stopped:
            return None
        text = self._stop.push(self._text.finish())
        piece = self._out(text + self._stop.finish())
        left = () if self.stopped else tuple(self._held)
        return Piece(piece.text if piece else "", (piece.chances if piece else ()) + left) if piece or left else None

    def _out(self, text: str) -> Piece | None:
        """What may go: a text, and the tokens that begin before its end."""
        self._told += len(text)
        chances = []
        while self._held and self._held[0].offset < self._told:
            chances.append(self._held.popleft())
        return Piece(text, tuple(chances)) if text else None


class Scoring(RunningSequence):
    """A text whose tokens are being scored."""

    want: Literal["last", "all"] = "all"

    def __init__(self, model: Model, text: str, sink: Sink, user: str = "") -> None:
        """Tokenises the text.

        Raises:
            EbbflowError: CONTEXT_TOO_LONG if the text is longer than the student's context.
        """
        self._scored_text = text
        super().__init__(model, prompt_tokens(model, text, room=0), sink, user)
        self._log_probs: list[float] = []

    def rebind(self, model: Model) -> None:
        """Tokenises the text for another release.

        Raises:
            EbbflowError: as when made.
        """
        self.model = model
        self._tokens = prompt_tokens(model, self._scored_text, room=0)
        self.restart()

    def restart(self) -> None:
        """Scores everything again."""
        super().restart()
        self._log_probs = []

    def accept(self, logits: Floats) -> int:
        """Scores the tokens that follow those just seen."""
        first = self._seen - len(logits) + 1
        targets_T = np.asarray(self._tokens[first : self._seen + 1])
        if len(targets_T):
            self._log_probs += (-token_losses(logits[: len(targets_T)], targets_T)).tolist()
        if not self.waiting_tokens:
            self._end(Scored(self._log_probs), "scored")
        return 0
