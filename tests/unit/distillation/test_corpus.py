import json

import pytest

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.distillation import corpus
from ebbflow.common.errors import EbbflowError, Reason


def _line(**fields: object) -> bytes:
    return json.dumps({"topic": "sea", "text": "waves", **fields}).encode()


def test_topics_keep_the_order_of_first_appearance_and_splits_default_to_train() -> None:
    parsed = corpus.parse([_line(topic="b"), b"  \n", _line(topic="a", split="gate"), _line(topic="b", split="bin")])
    assert parsed.topics == ["b", "a"]
    assert [(text.topic, text.split) for text in parsed.texts] == [("b", "train"), ("a", "gate"), ("b", "bin")]
    assert [text.topic for text in parsed.split("gate")] == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'"text"',
        b"\xff\xfe",
        _line(topic=""),
        _line(topic=3),
        _line(topic="x" * 201),
        _line(text=" "),
        _line(text=None),
        _line(split="test"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(line: bytes) -> None:
    with pytest.raises(EbbflowError, match="line 2") as caught:
        corpus.parse([_line(), line])
    assert caught.value.reason is Reason.CORPUS_INVALID


def test_a_corpus_without_training_text_is_refused() -> None:
    with pytest.raises(EbbflowError, match="'train'") as caught:
        corpus.parse([_line(split="gate")])
    assert caught.value.reason is Reason.CORPUS_INVALID


def test_lines_are_joined_across_the_chunks_of_a_blob(blobs: LocalBlobStore) -> None:
    lines = [_line(text="é" * 100_000), _line(text="end", split="gate")]
    blob = blobs.put([b"\n".join(lines)])
    assert [text.text for text in corpus.load(blobs, blob.sha256).texts] == ["é" * 100_000, "end"]


def test_a_missing_blob_is_named(blobs: LocalBlobStore) -> None:
    with pytest.raises(EbbflowError) as caught:
        corpus.load(blobs, "0" * 64)
    assert caught.value.reason is Reason.BLOB_NOT_FOUND


def test_without_gate_texts_some_are_set_aside_but_never_the_only_one_of_a_topic() -> None:
    lines = [_line(topic="many", text=str(number)) for number in range(45)]
    parsed = corpus.parse([*lines, _line(topic="two", text="x"), _line(topic="two", text="y"), _line(topic="one")])
    assert [(text.topic, text.text) for text in parsed.split("gate")] == [("many", "19"), ("many", "39"), ("two", "y")]
    assert len(parsed.split("train")) == 45 + 2 + 1 - 3
