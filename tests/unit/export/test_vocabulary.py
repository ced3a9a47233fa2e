"""Tokenizers as llama.cpp is told them."""

import contextlib
import copy
import json
from typing import Any

import export_world as world
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import SPLITS, byte_level, sentence_piece

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.export import vocabulary
from ebbflow.common.export.vocabulary import TokenType
from ebbflow.common.student.tokens import Tokenizer


def test_our_own_tokenizers_are_gpt_2_in_the_words_of_llama_cpp() -> None:
    tokenizer = world.tokenizer()
    found = vocabulary.read(tokenizer.to_bytes(), tokenizer.size)
    merges = json.loads(tokenizer.to_bytes())["model"]["merges"]
    assert (found.model, found.pre, found.scores) == ("gpt2", "gpt-2", [])
    assert found.merges == [" ".join(pair) for pair in merges]
    assert found.types == [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (tokenizer.size - 3)


@pytest.mark.parametrize("name", SPLITS)
def test_splittings_that_llama_cpp_knows_are_named(name: str) -> None:
    backend = byte_level(name)
    assert vocabulary.read(backend.to_bytes(), backend.size).pre == name


def test_sentence_piece_becomes_scores_by_the_ranks_of_merges() -> None:
    tokenizer = sentence_piece("first")
    found = vocabulary.read(tokenizer.to_bytes(), tokenizer.size)
    parsed = json.loads(tokenizer.to_bytes())
    first = "".join(parsed["model"]["merges"][0])
    assert (found.model, found.pre, found.merges) == ("llama", "", [])
    assert found.scores[found.tokens.index(first)] == 0.0
    assert found.types[found.tokens.index("<0x0A>")] is TokenType.BYTE
    assert found.types[found.tokens.index("<unk>")] is TokenType.UNKNOWN
    assert found.blank_prefix is True
    assert vocabulary.read(sentence_piece("never").to_bytes(), tokenizer.size).blank_prefix is False


def test_tokens_that_only_the_student_has_get_names_of_their_own() -> None:
    tokenizer = world.tokenizer()
    found = vocabulary.read(tokenizer.to_bytes(), tokenizer.size + 2)
    assert found.tokens[-2:] == [f"[UNUSED_{tokenizer.size}]", f"[UNUSED_{tokenizer.size + 1}]"]
    assert found.types[-2:] == [TokenType.UNUSED] * 2


def changed(tokenizer: Tokenizer, **parts: Any) -> bytes:
    return json.dumps({**json.loads(tokenizer.to_bytes()), **parts}).encode()


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "not BPE"),
        ({"normalizer": {"type": "Lowercase"}}, "changes text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level"),
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "blank before every text"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}}, "no name for how it splits"),
        ({"pre_tokenizer": None}, "as `tokenizers` writes it"),
    ],
)
def test_what_llama_cpp_cannot_be_told_is_refused_with_the_reason(parts: dict[str, Any], why: str) -> None:
    tokenizer = world.tokenizer()
    with pytest.raises(EbbflowError, match=why) as caught:
        vocabulary.read(changed(tokenizer, **parts), tokenizer.size)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_REQUEST, "format")
    assert "--format hf" in str(caught.value)


def test_a_blank_mark_that_llama_cpp_would_not_make_is_refused() -> None:
    tokenizer = sentence_piece("first")
    lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    for parts in ({"pre_tokenizer": None, "normalizer": lower}, {"pre_tokenizer": {"type": "Whitespace"}}):
        with pytest.raises(EbbflowError, match=r"in a way that llama\.cpp does not"):
            vocabulary.read(changed(tokenizer, **parts), tokenizer.size)


def test_two_tokens_of_one_text_or_beyond_the_student_are_refused() -> None:
    tokenizer = world.tokenizer()
    with pytest.raises(EbbflowError, match="beyond the student"):
        vocabulary.read(tokenizer.to_bytes(), tokenizer.size - 1)
    added = [{"id": tokenizer.size, "content": "<s>", "special": True}]
    twice = changed(tokenizer, added_tokens=[*json.loads(tokenizer.to_bytes())["added_tokens"], *added])
    with pytest.raises(EbbflowError, match="the same text"):
        vocabulary.read(twice, tokenizer.size + 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WHOLE: dict[str, Any] = json.loads(world.tokenizer().to_bytes())
PLACES = [(key,) for key in WHOLE] + [(outer, key) for outer in ("model", "pre_tokenizer") for key in WHOLE[outer]]


@given(st.sampled_from(PLACES), JSON)
def test_a_malformed_tokenizer_is_an_error_that_says_so_or_no_error(place: tuple[str, ...], value: Any) -> None:
    parsed = copy.deepcopy(WHOLE)
    inner = parsed[place[0]] if len(place) > 1 else parsed
    inner[place[-1]] = value
    with contextlib.suppress(EbbflowError):  # and no other
        found = vocabulary.read(json.dumps(parsed).encode(), 400)
        assert len(set(found.tokens)) == 400
        assert all(isinstance(text, str) for text in (*found.tokens, *found.merges))


@given(st.binary(max_size=40))
def test_no_bytes_break_the_reading(data: bytes) -> None:
    with pytest.raises(EbbflowError):
        vocabulary.read(data, 10)
