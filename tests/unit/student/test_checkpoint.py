"""Checkpoints: sharded, doubled and damaged ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.checkpoint import load_checkpoint, save_checkpoint
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student

CONFIG = StudentConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(Student.random(CONFIG, seed=0), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded(folder: Path, dtype: torch.dtype) -> None:
    student = load_checkpoint(folder, dtype)
    for name, tensor in Student.random(CONFIG, seed=0).state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor.to(dtype))
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_bfloat16_student_is_saved_as_it_is(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(folder, torch.bfloat16), tmp_path / "half")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_written_by_transformers_are_loaded(tmp_path: Path) -> None:
    reference = Ernie4_5ForCausalLM(Ernie4_5Config(**CONFIG.to_hf()))
    reference.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens_BT = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(tmp_path)(tokens_BT), reference(tokens_BT).logits, atol=1e-5, rtol=0)


def test_a_tied_head_that_is_there_twice_is_loaded_once(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert load_checkpoint(folder).config == CONFIG


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])


def index(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "half a configuration": (lambda folder: (folder / "config.json").write_text('{"a'), "config.json"),
    "a list as configuration": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "cut weights": (cut, "model.safetensors"),
    "a missing tensor": (edit(lambda t: t.pop("model.norm.weight")), "lacks tensor 'model.norm.weight'"),
    "a tensor too many": (edit(lambda t: t.update(extra=torch.zeros(1))), "unexpected tensor 'extra'"),
    "a wrong shape": (edit(lambda t: t.update({"model.norm.weight": torch.zeros(31)})), "model.norm.weight"),
    "integers": (edit(lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})), "quantised"),
    "another head": (edit(lambda t: t.update({"lm_head.weight": torch.zeros(97, 32)})), "tie_word_embeddings"),
    "an index without a map": (index("{}"), "weight_map"),
    "an index to elsewhere": (index('{"weight_map": {"a": "../../x"}}'), "outside"),
    "an index to nothing": (index('{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, damage: str) -> None:
    spoil, named = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(EbbflowError, match=named) as caught:
        load_checkpoint(folder)
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE


def test_a_checkpoint_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EbbflowError) as caught:
        save_checkpoint(Student.random(CONFIG, seed=0), tmp_path / "file")
    assert caught.value.reason is Reason.CONFIG_INVALID
