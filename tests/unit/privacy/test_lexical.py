"""Likeness by shared words."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.privacy.lexical import Lexicon

PUBLIC = ["the tide comes in", "waves and the shore", "the wind turns", "clouds and the sky"]


def encode(text: str) -> list[int]:
    return [hash_of(word) for word in text.split()]


def hash_of(word: str) -> int:
    return sum(word.encode()) % 997


def likeness(left: str, right: str) -> float:
    lexicon = Lexicon(PUBLIC, encode, 997)
    a, b = lexicon([left, right])
    return float(a @ b)


def test_rare_words_count_and_common_ones_do_not() -> None:
    assert likeness("tide", "the tide comes in") > 0.3
    assert likeness("the", "the wind turns") == likeness("the", "the tide comes in")
    assert likeness("tide", "the wind turns") == 0


def test_a_text_without_a_known_word_is_like_nothing() -> None:
    assert likeness("zebra", "the tide comes in") == 0
    assert likeness("", "the tide comes in") == 0


@given(st.lists(st.text(st.sampled_from("tidewavsk "), max_size=30), min_size=1, max_size=5))
def test_every_row_has_length_one_or_zero_and_depends_on_its_text_alone(texts: list[str]) -> None:
    lexicon = Lexicon(PUBLIC, encode, 997)
    rows = lexicon(texts)
    lengths = np.linalg.norm(rows, axis=1)
    assert np.all(np.isclose(lengths, 1) | (lengths == 0))
    for row, text in zip(rows, texts, strict=True):
        assert np.array_equal(row, lexicon([text])[0])
