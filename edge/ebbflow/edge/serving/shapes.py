"""Answers in the shapes of OpenAI's API."""

import time
from typing import Protocol

from ebbflow.edge.serving.answering import Answer
from ebbflow.edge.serving.chat import Opening
from ebbflow.edge.serving.sequences import Finished

Json = dict[str, object]


class Shape(Protocol):
    """How one kind of answer looks."""

    include_usage: bool

    def first(self, answer: Answer) -> Json | None:
        """The first event of a stream, if it is not a piece of text."""

    def piece(self, answer: Answer, text: str) -> Json | None:
        """An event with text; None if nothing is left of it."""

    def last(self, answer: Answer, end: Finished) -> Json:
        """The event that ends the answer."""

    def usage(self, answer: Answer, end: Finished) -> Json:
        """The event after the last that tells the usage."""

    def whole(self, answer: Answer, text: str, end: Finished) -> Json:
        """The answer at once."""


class CompletionShape:
    """POST /v1/completions."""

    def __init__(self, *, include_usage: bool) -> None:
        """Notes whether a stream ends with the usage, and the time."""
        self.include_usage = include_usage
        self._created_s = int(time.time())

    def first(self, answer: Answer) -> Json | None:
        """Nothing goes before the text."""
        return None

    def piece(self, answer: Answer, text: str) -> Json | None:
        """An event with text."""
        return self._head(answer) | {"choices": [_choice(None, text=text)]}

    def last(self, answer: Answer, end: Finished) -> Json:
        """The event that ends the answer."""
        return self._head(answer) | {"choices": [_choice(end, text="")]}

    def usage(self, answer: Answer, end: Finished) -> Json:
        """The event that tells the usage."""
        return self._head(answer) | {"choices": [], "usage": _usage(end)}

    def whole(self, answer: Answer, text: str, end: Finished) -> Json:
        """The answer at once."""
        return self._head(answer) | {"choices": [_choice(end, text=text)], "usage": _usage(end)}

    def _head(self, answer: Answer) -> Json:
        return _head(answer, "text_completion", self._created_s)


class ChatShape:
    """POST /v1/chat/completions."""

    def __init__(self, *, include_usage: bool) -> None:
        """Notes whether a stream ends with the usage, and the time."""
        self.include_usage = include_usage
        self._created_s = int(time.time())
        self._opening = Opening()

    def first(self, answer: Answer) -> Json | None:
        """Says who speaks."""
        return self._chunk(answer, _choice(None, delta={"role": "assistant", "content": ""}))

    def piece(self, answer: Answer, text: str) -> Json | None:
        """An event with text."""
        text = self._opening.push(text)
        return self._chunk(answer, _choice(None, delta={"content": text})) if text else None

    def last(self, answer: Answer, end: Finished) -> Json:
        """The event that ends the answer."""
        return self._chunk(answer, _choice(end, delta={}))

    def usage(self, answer: Answer, end: Finished) -> Json:
        """The event that tells the usage."""
        return self._chunk(answer) | {"usage": _usage(end)}

    def whole(self, answer: Answer, text: str, end: Finished) -> Json:
        """The answer at once."""
        message = {"role": "assistant", "content": text.lstrip(), "refusal": None}
        head = _head(answer, "chat.completion", self._created_s)
        return head | {"choices": [_choice(end, message=message)], "usage": _usage(end)}

    def _chunk(self, answer: Answer, *choices: Json) -> Json:
        return _head(answer, "chat.completion.chunk", self._created_s) | {"choices": list(choices)}


def _head(answer: Answer, kind: str, created_s: int) -> Json:
    """The id is the interaction's; the model is the release, so that an application knows who answered."""
    return {"id": answer.interaction_id, "object": kind, "created": created_s, "model": answer.release}


def _choice(end: Finished | None, **content: object) -> Json:
    return {"index": 0, **content, "logprobs": None, "finish_reason": end.reason.value if end else None}


def _usage(end: Finished) -> Json:
    counts = {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.completion_tokens}
    return {**counts, "total_tokens": end.prompt_tokens + end.completion_tokens}
