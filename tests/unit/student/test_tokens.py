"""Tokenizers: our own and those of teachers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def quick(fox):\n    return lazy + dog\n" * 3,
    "日本語とemoji 🌊",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def teacher(specials: list[str]) -> bytes:
    """A tokenizer.json whose special tokens come last."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    backend.add_special_tokens(specials)
    return str(backend.to_str()).encode()


def test_our_special_tokens_come_first(trained: Tokenizer) -> None:
    assert (trained.pad_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    assert trained.size == 300


@given(st.text())
def test_every_text_comes_back(trained: Tokenizer, text: str) -> None:
    tokens = trained.encode(text)
    assert trained.decode(tokens) == text
    assert all(2 < token < trained.size for token in tokens)
    assert trained.encode_batch([text, text], bos=True) == [trained.encode(text, bos=True)] * 2


@pytest.mark.parametrize("text", ["</s>", "a<s>b", "<pad>"])
def test_text_cannot_forge_special_tokens(trained: Tokenizer, text: str) -> None:
    for tokenizer in (trained, Tokenizer.from_bytes(trained.to_bytes())):
        assert min(tokenizer.encode(text)) > 2
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_not_text(trained: Tokenizer) -> None:
    assert trained.decode([1, *trained.encode("fox"), 2, 0]) == "fox"
    assert trained.encode("fox", bos=True) == [1, *trained.encode("fox")]


def test_training_in_another_process_gives_the_same_bytes(trained: Tokenizer) -> None:
    code = f"""
import sys
from ebbflow.common.student.tokens import Tokenizer
sys.stdout.buffer.write(Tokenizer.train(iter({TEXTS!r}), 300).to_bytes())
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout
    assert found == trained.to_bytes()


def test_few_texts_give_fewer_tokens() -> None:
    assert Tokenizer.train(["aa"], 5000).size < 300


def test_a_vocabulary_without_room_for_every_byte_is_refused() -> None:
    with pytest.raises(EbbflowError, match="259") as caught:
        Tokenizer.train(TEXTS, 258)
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_a_file_keeps_everything(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert loaded.to_bytes() == trained.to_bytes()
    assert loaded.encode(TEXTS[0]) == trained.encode(TEXTS[0])
    assert loaded.eos_id == 2


def test_a_teachers_special_tokens_are_found_by_their_usual_names() -> None:
    tokenizer = Tokenizer.from_bytes(teacher(["<|endoftext|>", "<bos>"]))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (280, 281, 280)
    assert tokenizer.encode("fox", bos=True)[0] == 281


def test_a_teacher_names_its_special_tokens_itself(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(teacher(["</s>", "<stop>", "<go>", "<fill>"]))
    names = {"eos_token": {"content": "<stop>"}, "bos_token": "<go>", "pad_token": "<fill>", "other": 3}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (281, 282, 283)
    again = Tokenizer.from_bytes((tmp_path / "tokenizer.json").read_bytes(), eos="<stop>", bos="<go>", pad="<fill>")
    assert again.eos_id == 281


def test_a_teacher_without_a_token_to_begin_with_needs_none() -> None:
    tokenizer = Tokenizer.from_bytes(teacher(["[EOS]"]))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("fox", bos=True) == tokenizer.encode("fox")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", teacher([])])
def test_what_is_no_tokenizer_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(EbbflowError) as of_bytes:
        Tokenizer.from_bytes(data)
    with pytest.raises(EbbflowError) as of_file:
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert of_bytes.value.reason is of_file.value.reason is Reason.CHECKPOINT_UNREADABLE


def test_a_missing_file_or_a_damaged_one_beside_it_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(EbbflowError, match="gone"):
        Tokenizer.from_file(tmp_path / "gone.json")
    trained.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(EbbflowError, match=r"tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


@given(st.text())
def test_the_bytes_of_tokens_join_to_the_text(trained: Tokenizer, text: str) -> None:
    assert b"".join(map(trained.token_bytes, trained.encode(text, bos=True))) == text.encode()


def test_tokens_that_stand_for_no_text_have_no_bytes(trained: Tokenizer) -> None:
    assert {trained.token_bytes(token) for token in (0, 1, 2, 10**6)} == {b""}


def test_tokens_of_other_kinds_have_their_bytes_too() -> None:
    vocabulary = {"</s>": 0, "<unk>": 1, "<0xE6>": 2, "\u2581a": 3, "bc": 4}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["<think> \u00fc"])
    tokenizer = Tokenizer(backend)
    assert [tokenizer.token_bytes(token) for token in (0, 2, 3, 4)] == [b"", b"\xe6", b" a", b"bc"]
    assert tokenizer.token_bytes(tokenizer.encode("<think> \u00fc")[0]) == "<think> \u00fc".encode()
