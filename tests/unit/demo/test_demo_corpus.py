"""The demo's corpus: the same on every run, and nothing that users ask for was ever trained on."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest

from demo import corpus


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    return corpus.build()


def test_two_builds_give_the_same_corpus(documents: list[corpus.Document]) -> None:
    assert corpus.build() == documents


def test_every_topic_has_texts_of_every_split(documents: list[corpus.Document]) -> None:
    counts = Counter((document.topic, document.split) for document in documents)
    assert len(corpus.TOPICS) == 12
    for topic in corpus.TOPICS:
        assert counts[topic, "bin"] >= corpus.BIN_TEXTS
        assert counts[topic, "train"] > counts[topic, "asked"] > counts[topic, "gate"] > 0


def test_no_topic_is_much_larger_than_another(documents: list[corpus.Document]) -> None:
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.topic] += len(document.text)
    assert max(sizes.values()) <= corpus.TOPIC_CHARS
    assert min(sizes.values()) >= corpus.TOPIC_CHARS // 2


def test_texts_are_unique_and_of_a_readable_length(documents: list[corpus.Document]) -> None:
    texts = [document.text for document in documents]
    assert len(set(texts)) == len(texts)
    assert all(corpus.MIN_CHARS <= len(text) <= 2 * corpus.MAX_CHARS + 1 for text in texts)


def test_an_entry_is_in_one_split_only(documents: list[corpus.Document]) -> None:
    splits: dict[tuple[str, str], set[str]] = {}
    for document in documents:
        title = document.text.partition("\n")[0]
        splits.setdefault((document.topic, title), set()).add(document.split)
    torn = [title for title, found in splits.items() if len(found) > 1]
    assert len(torn) <= len(splits) // 100  # overloads and properties may share a title without sharing a text


def test_what_users_ask_for_is_not_in_the_corpus_file(documents: list[corpus.Document]) -> None:
    lines = [json.loads(line) for line in corpus.corpus_lines(documents).splitlines()]
    assert {line["split"] for line in lines} == {"train", "bin", "gate"}
    assert all(set(line) == {"topic", "text", "split"} for line in lines)
    asked = {document.text for document in documents if document.split == "asked"}
    assert not asked & {line["text"] for line in lines}


def test_a_text_that_repeats_an_earlier_one_is_left_out() -> None:
    words = "one two three four five six seven eight nine ten"
    seen: dict[int, int] = {}
    assert list(corpus.unlike([f"a\n{words}", f"b\n{words} eleven", "c\nsomething else altogether"], seen)) == [
        f"a\n{words}",
        "c\nsomething else altogether",
    ]


def test_sources_are_read_and_never_run(tmp_path: Path) -> None:
    body = "It must not be imported, only read: " + "many words follow. " * 8 + "The end."
    (tmp_path / "heapq.py").write_text(f'"""{body}"""\nraise SystemExit("was run")\n')
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "test").mkdir()
    (tmp_path / "random" / "test" / "x.py").write_text('"""A test."""\n')
    assert list(corpus.module_entries(tmp_path, ["heapq", "random", "missing"])) == [("heapq", body)]


def test_an_entry_carries_name_and_signature() -> None:
    tree = ast.parse('class A:\n    def f(self, x=1):\n        """Says."""\n')
    assert list(corpus._documented(tree, "m")) == [("m.A.f(self, x=1)", "Says.")]


def test_a_long_entry_is_cut_between_paragraphs() -> None:
    paragraphs = [f"{letter * 300}" for letter in "abcdef"]
    pieces = list(corpus.pieces("title", "\n\n".join(paragraphs)))
    assert [piece.splitlines()[0] for piece in pieces] == ["title"] * len(pieces)
    assert all(len(piece) < corpus.MAX_CHARS + 20 for piece in pieces)
    assert all(any(paragraph in piece for piece in pieces) for paragraph in paragraphs)
