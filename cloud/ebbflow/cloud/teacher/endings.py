"""Texts that end an answer."""

from collections.abc import Sequence

from ebbflow.common.student.tokens import Tokenizer

_SPARE_TOKENS = 4
"""A character may have begun in the tokens before a stop text's own."""


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Returns a text up to the stop text that comes first, and whether there was one."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


class Ending:
    """Watches an answer for stop texts, token by token; looks at the end of it only."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens = max((len(stop.encode()) for stop in stops), default=0) + _SPARE_TOKENS

    def reached(self, written: Sequence[int]) -> bool:
        """Whether a stop text ends with the token that was written last."""
        if not self._stops:
            return False
        return cut(self._tokenizer.decode(written[-self._tokens :]), self._stops)[1]
