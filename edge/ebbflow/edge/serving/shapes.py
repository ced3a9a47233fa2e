"""Answers in the shapes of OpenAI's API."""

import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ebbflow.edge.serving.answering import Answer, Embedded
from ebbflow.edge.serving.chances import TokenChance
from ebbflow.edge.serving.chat import Opening
from ebbflow.edge.serving.sequences import Finished, Piece
from ebbflow.edge.serving.vectors import Floats, unit

Json = dict[str, object]


@dataclass(frozen=True)
class Whole:
    """An answer that has ended."""

    piece: Piece
    end: Finished


@dataclass(frozen=True)
class Usage:
    """Tokens of all choices; a prompt counts once, however many choices continue it."""

    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, ends: Sequence[Finished], choices_of_each: int) -> "Usage":
        """Adds up the choices of all prompts, those of each prompt beside each other."""
        prompts = sum(end.prompt_tokens for end in ends[::choices_of_each])
        return cls(prompts, sum(end.completion_tokens for end in ends))

    def json(self) -> Json:
        """Returns it as OpenAI's clients read it."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": self.prompt_tokens + self.completion_tokens}


class Shape(Protocol):
    """How one choice of a response looks."""

    kind: str
    """Of a whole response."""
    chunk_kind: str
    """Of an event of a stream."""

    def first(self) -> Json | None:
        """What begins a stream, if it is not a piece of text."""

    def piece(self, piece: Piece) -> Json | None:
        """Part of an answer; None if nothing is left of it."""

    def last(self, end: Finished) -> Json:
        """What ends a stream."""

    def whole(self, whole: Whole) -> Json:
        """The answer at once."""


class CompletionShape:
    """POST /v1/completions."""

    kind = chunk_kind = "text_completion"

    def __init__(self, *, echo: str = "") -> None:
        """Takes the text that comes before the answer."""
        self._echo = echo

    def first(self) -> Json | None:
        """The echo."""
        return {"text": self._echo, "logprobs": None} if self._echo else None

    def piece(self, piece: Piece) -> Json | None:
        """Text, and the tokens' log-probabilities where they were asked for."""
        log_probs = self._log_probs(piece.chances) if piece.chances else None
        return {"text": piece.text, "logprobs": log_probs}

    def last(self, end: Finished) -> Json:
        """No text any more."""
        del end
        return {"text": "", "logprobs": None}

    def whole(self, whole: Whole) -> Json:
        """The echo and the answer."""
        return {**(self.piece(whole.piece) or {}), "text": self._echo + whole.piece.text}

    def _log_probs(self, chances: Sequence[TokenChance]) -> Json:
        return {
            "tokens": [token_text(chance.token) for chance in chances],
            "token_logprobs": [chance.log_prob for chance in chances],
            "top_logprobs": [
                {token_text(other.token): other.log_prob for other in (chance, *reversed(chance.top))}
                for chance in chances
            ]
            if any(chance.top for chance in chances)
            else None,
            "text_offset": [len(self._echo) + chance.offset for chance in chances],
        }


@dataclass
class ChatShape:
    """POST /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    _opening: Opening = field(default_factory=Opening)

    def first(self) -> Json | None:
        """Says who speaks."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, piece: Piece) -> Json | None:
        """Text, and the tokens' log-probabilities where they were asked for."""
        text, log_probs = self._opening.push(piece.text), _chat_log_probs(piece.chances)
        return {"delta": {"content": text}, "logprobs": log_probs} if text or log_probs else None

    def last(self, end: Finished) -> Json:
        """No text any more."""
        del end
        return {"delta": {}, "logprobs": None}

    def whole(self, whole: Whole) -> Json:
        """The assistant's message."""
        message = {"role": "assistant", "content": whole.piece.text.lstrip(), "refusal": None}
        return {"message": message, "logprobs": _chat_log_probs(whole.piece.chances)}


class Reply:
    """A response with one or several choices. Its id is the first choice's interaction's.

    Attributes:
        include_usage: whether a stream ends with the usage.
        shapes: of the choices.
    """

    def __init__(
        self, answers: Sequence[Answer], shapes: Sequence[Shape], *, include_usage: bool, choices_of_each: int = 1
    ) -> None:
        """Takes the answers with their shapes; `choices_of_each` is as in `Usage.of`."""
        self.shapes, self.include_usage = shapes, include_usage
        self._answers, self._choices_of_each = answers, choices_of_each
        self._created_s = int(time.time())

    def chunk(self, index: int, content: Json, end: Finished | None = None) -> Json:
        """An event of a stream with part of one choice."""
        return self._head(self.shapes[0].chunk_kind) | {"choices": [self._choice(index, content, end)]}

    def usage(self, ends: Sequence[Finished]) -> Json:
        """The event after the last."""
        usage = Usage.of(ends, self._choices_of_each).json()
        return self._head(self.shapes[0].chunk_kind) | {"choices": [], "usage": usage}

    def whole(self, wholes: Sequence[Whole]) -> Json:
        """The response at once."""
        contents = enumerate(zip(self.shapes, wholes, strict=True))
        choices = [self._choice(index, shape.whole(whole), whole.end) for index, (shape, whole) in contents]
        usage = Usage.of([whole.end for whole in wholes], self._choices_of_each).json()
        return self._head(self.shapes[0].kind) | {"choices": choices, "usage": usage}

    def _head(self, kind: str) -> Json:
        """The model is the release, so that an application knows who answered."""
        first = self._answers[0]
        return {"id": first.interaction_id, "object": kind, "created": self._created_s, "model": first.release}

    def _choice(self, index: int, content: Json, end: Finished | None) -> Json:
        """Where there are several, each tells the id by which the application can say what became of it."""
        answer = self._answers[index]
        own: Json = {"interaction_id": answer.interaction_id} if len(self._answers) > 1 else {}
        if answer.escalated:
            own["escalated"] = True
        return {"index": index, **content, "finish_reason": end.reason.value if end else None, **own}


def embeddings(found: Embedded, *, base64: bool) -> Json:
    """The response of /v1/embeddings: vectors of length 1, as numbers or as base64 of little-endian float32."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _encoded(unit(vector)) if base64 else unit(vector).tolist(),
        }
        for index, vector in enumerate(found.vectors)
    ]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return {"object": "list", "data": data, "model": found.release, "usage": usage}


def _encoded(vector: Floats) -> str:
    return b64encode(vector.astype("<f4").tobytes()).decode()


def token_text(token: bytes) -> str:
    r"""Returns a token as text, or as OpenAI's API writes bytes that are none: "bytes:\xe6"."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _chat_log_probs(chances: Sequence[TokenChance]) -> Json | None:
    if not chances:
        return None
    content = [_entry(chance) | {"top_logprobs": [_entry(other) for other in chance.top]} for chance in chances]
    return {"content": content, "refusal": None}


def _entry(chance: TokenChance) -> Json:
    return {"token": token_text(chance.token), "logprob": chance.log_prob, "bytes": list(chance.token)}
