"""Likeness in the cloud: a supplied sentence encoder, a release's states, or shared words."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_models import tokenizer

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.distillation import likeness
from ebbflow.cloud.release.packing import pack_weights
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student

TEXTS = ["the tide comes in", "waves", "salt dries on the rope and the road climbs the hill", ""]


def student() -> Student:
    tokens = tokenizer()
    config = StudentConfig(
        vocab_size=tokens.size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=24,
        rope_theta=10_000.0,
        pad_token_id=tokens.pad_id,
        bos_token_id=tokens.bos_id,
        eos_token_id=tokens.eos_id,
    )
    return Student.random(config, 0, 0.2).eval().requires_grad_(False)


def test_words_are_likened_without_case_and_unknown_ones_say_nothing() -> None:
    embed = likeness.by_words(["the tide comes in", "the wind turns"])
    rows = np.asarray(embed(["TIDE, comes!", "the tide comes in", "unheard of"]))
    assert float(rows[0] @ rows[1]) > 0.5
    assert not rows[2].any()
    assert np.asarray(likeness.by_words([])(["anything"])).shape == (1, 1)


def test_a_large_vocabulary_keeps_its_most_common_words() -> None:
    public = [f"common word{at}" for at in range(likeness.MOST_WORDS + 50)]
    rows = np.asarray(likeness.by_words(public)(["word0", "common", f"word{len(public) - 1}"]))
    assert rows.shape == (3, likeness.MOST_WORDS)
    assert rows[0].any()
    assert not rows[2].any()


def test_a_text_is_the_mean_of_its_own_states_whatever_is_in_the_batch() -> None:
    model, tokens = student(), tokenizer()
    embed = likeness.of_student(model, tokens)
    together = embed(TEXTS)
    for text, row_E in zip(TEXTS, together, strict=True):
        ids = (tokens.encode(text, bos=True) or [tokens.eos_id])[:24]
        alone = model.hidden(torch.tensor([ids]))[0].mean(dim=0).numpy()
        np.testing.assert_allclose(row_E, alone, atol=1e-5)


def test_a_releases_weights_are_read_and_nothing_is_left_behind(blobs: LocalBlobStore, tmp_path: Path) -> None:
    model, tokens = student(), tokenizer()
    model.to(torch.bfloat16).to(torch.float32)
    packed = pack_weights(model, tokens.to_bytes(), blobs, [[1, 2, 3]], tmp_path / "pack")
    kinds = {"tokenizer": packed.tokenizer, "bf16": packed.variants["bf16"]}
    targets = {kind: {"kind": kind, "sha256": blob.sha256} for kind, blob in kinds.items()}
    embed = likeness.choose("", targets, TEXTS, blobs, tmp_path / "scratch")
    np.testing.assert_allclose(embed(TEXTS), likeness.of_student(model, tokens)(TEXTS), atol=1e-4)
    assert not list((tmp_path / "scratch").iterdir())


def save_encoder(folder: Path) -> Path:
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokens = tokenizer()
    tokens.save(folder / "tokenizer.json")
    return folder


def test_a_sentence_encoder_is_loaded_from_its_folder(blobs: LocalBlobStore, tmp_path: Path) -> None:
    embed = likeness.choose(str(save_encoder(tmp_path / "encoder")), None, TEXTS, blobs, tmp_path)
    rows = embed(TEXTS)
    assert rows.shape == (4, 16)
    np.testing.assert_allclose(embed(TEXTS[:1])[0], rows[0], atol=1e-5)
    assert not np.allclose(rows[0], rows[1])


@pytest.mark.parametrize("broken", ["missing", "config", "weights"])
def test_an_encoder_that_cannot_be_loaded_says_so(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "encoder"
    if broken != "missing":
        save_encoder(folder)
    if broken == "config":
        (folder / "config.json").write_text("{")
    if broken == "weights":
        (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EbbflowError) as caught:
        likeness.sentence_encoder(str(folder))
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE
