"""Chat for students without a chat template of their own: a plain transcript that they continue."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "developer", "user", "assistant"]
_SPEAKERS: dict[Role, str] = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}

# Where the student begins to speak for somebody else, its answer is over.
STOPS = tuple(dict.fromkeys(f"\n{speaker}:" for speaker in _SPEAKERS.values()))


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: Role
    text: str


def transcript(messages: Sequence[Message]) -> str:
    """Returns "System: ...", "User: ...", "Assistant: ..." line by line, ending where the assistant is to speak."""
    lines = [f"{_SPEAKERS[message.role]}: {message.text}" for message in messages]
    return "\n".join([*lines, f"{_SPEAKERS['assistant']}:"])


def last_said(messages: Sequence[Message]) -> str:
    """Returns the user's last message; empty if there is none."""
    return next((message.text for message in reversed(messages) if message.role == "user"), "")


class Opening:
    """Drops the white space between "Assistant:" and the first word."""

    def __init__(self) -> None:
        """Waits for the first word."""
        self._begun = False

    def push(self, text: str) -> str:
        """Returns what is left of a piece."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text
