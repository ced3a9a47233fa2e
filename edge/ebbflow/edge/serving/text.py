"""Turning tokens into text piece by piece: never half a character, never part of a stop text."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most four bytes, so this many tokens without a whole one are broken text: let it out.
_LONGEST_WAIT = 8
_LARGEST_BEGINNING = 3
"""Tokens of one byte that may be the beginning of a character."""


class TokenText:
    """Decodes tokens one at a time.

    A token may hold part of a character only, and some tokenizers change a token's text by what stands before it. So
    the last tokens are decoded with and without the new one, and text comes out once it ends in a whole character (the
    way of Hugging Face's text-generation-inference).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Takes the tokenizer's decoding."""
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded again for context
        self._done = 0  # tokens whose text has come out

    def push(self, token: int) -> str:
        """Returns the text that the token completes; empty inside a character."""
        if self._done < len(self._tokens) and not self._decode([token]):
            return ""  # a token without a text inside a character: it must not use up the wait for the rest
        self._tokens.append(token)
        return self._advance(whole=True)

    def finish(self) -> str:
        """Returns what is left, with replacement characters for what never became whole."""
        return self._advance(whole=False)

    def _advance(self, *, whole: bool) -> str:
        before = self._decode(self._tokens[self._start : self._done])
        after = self._decode(self._tokens[self._start :])
        if after == before and not after.endswith(_REPLACEMENT):  # a token without a text
            self._done = len(self._tokens)
        end = len(self._tokens)
        if whole and after.endswith(_REPLACEMENT):
            if end - self._done < _LONGEST_WAIT:
                return ""
            end -= _LARGEST_BEGINNING  # these may still become a character
            after = self._decode(self._tokens[self._start : end])
        if len(after) <= len(before):
            return ""
        self._start, self._done = self._done, end
        return after[len(before) :]


class StopText:
    """Lets text through up to the first stop text, and holds back what may turn out to be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Takes the texts to stop at."""
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """Whether a stop text has come."""

    def push(self, text: str) -> str:
        """Returns the text that is certain to be part of the answer."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            answer, self._held = self._held[: min(found)], ""
            return answer
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        answer, self._held = self._held[:cut], self._held[cut:]
        return answer

    def finish(self) -> str:
        """Returns what was held back; nothing after a stop text."""
        answer, self._held = self._held, ""
        return answer


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
