"""The corpus of a student: texts by topic and split, from a blob with one JSON object on each line.

Imports no torch: the control plane reads topics from here when a student is created.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.common.errors import EbbflowError, Reason

Split = Literal["train", "gate", "bin"]
SPLITS = ("train", "gate", "bin")
MOST_TOPIC_CHARACTERS = 200
MOST_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Text:
    """One line of a corpus."""

    topic: str
    text: str
    split: Split
    """"train" is learned from, "gate" only measured on, "bin" describes the topic to agents."""


@dataclass(frozen=True)
class Corpus:
    """All texts of a student, in the order of the file.

    A corpus that marks none of them for the gate has some set aside by `parse`.
    """

    texts: tuple[Text, ...]

    @property
    def topics(self) -> list[str]:
        """Every topic once, in order of first appearance."""
        return list(dict.fromkeys(text.topic for text in self.texts))

    def split(self, split: Split) -> list[Text]:
        """Returns the texts of one split."""
        return [text for text in self.texts if text.split == split]


def stream(blobs: BlobStore, sha256: str) -> Iterator[Text]:
    """Yields the texts in a blob one by one, in bounded memory; blank lines are skipped.

    Raises:
        EbbflowError: BLOB_NOT_FOUND, or CORPUS_INVALID with the line that is wrong.
    """
    for number, line in enumerate(_lines(blobs.open(sha256)), 1):
        if line.strip():
            yield _text(line, number)


def load(blobs: BlobStore, sha256: str) -> Corpus:
    """Reads the corpus in a blob.

    Raises:
        EbbflowError: BLOB_NOT_FOUND, or CORPUS_INVALID with the line that is wrong.
    """
    return _corpus(stream(blobs, sha256))


def parse(lines: Iterable[bytes]) -> Corpus:
    """Reads a corpus; blank lines are skipped.

    If no text is of the split "gate", every twentieth training text of each topic, or its last, is set aside for it.

    Raises:
        EbbflowError: CORPUS_INVALID with the number of the line that is wrong, or if no text is there to train on.
    """
    return _corpus(_text(line, number) for number, line in enumerate(lines, 1) if line.strip())


def _corpus(read: Iterable[Text]) -> Corpus:
    texts = tuple(read)
    if not any(text.split == "train" for text in texts):
        raise EbbflowError(Reason.CORPUS_INVALID, "the corpus has no text of the split 'train'")
    if any(text.split == "gate" for text in texts):
        return Corpus(texts)
    return Corpus(_set_aside(texts))


def _set_aside(texts: Sequence[Text]) -> tuple[Text, ...]:
    """Marks some training texts of each topic for the gate, but never the only one."""
    places: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        if text.split == "train":
            places.setdefault(text.topic, []).append(place)
    chosen = {place for found in places.values() if len(found) > 1 for place in found[19::20] or found[-1:]}
    return tuple(replace(text, split="gate") if place in chosen else text for place, text in enumerate(texts))


def _text(line: bytes, number: int) -> Text:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _invalid(number, "it is not JSON in UTF-8") from error
    if not isinstance(value, dict):
        raise _invalid(number, "it is not a JSON object")
    topic, text, split = value.get("topic"), value.get("text"), value.get("split", "train")
    if not isinstance(topic, str) or not 1 <= len(topic) <= MOST_TOPIC_CHARACTERS:
        raise _invalid(number, f"'topic' must be a text of 1 to {MOST_TOPIC_CHARACTERS} characters")
    if not isinstance(text, str) or not text.strip():
        raise _invalid(number, "'text' must be a text that is not blank")
    if split not in SPLITS:
        raise _invalid(number, f"'split' must be one of {', '.join(SPLITS)}")
    return Text(topic, text, cast("Split", split))


def _invalid(number: int, why: str) -> EbbflowError:
    return EbbflowError(Reason.CORPUS_INVALID, f"line {number} of the corpus: {why}", line=number)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cuts a stream of chunks into lines, never holding more than one line and one chunk."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
        if len(rest) > MOST_LINE_BYTES:
            raise EbbflowError(Reason.CORPUS_INVALID, f"a line of the corpus is longer than {MOST_LINE_BYTES} bytes")
    if rest:
        yield rest
