import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

from ebbflow.cloud.teacher.model import Teacher, native_dtype
from ebbflow.common.errors import EbbflowError, Reason

SAVERS = [tiny_models.save_moe_teacher, tiny_models.save_llama_teacher]


@pytest.mark.parametrize("save", SAVERS)
def test_rows_are_the_logits_of_the_same_positions(save: Callable[[Path], Path], tmp_path: Path) -> None:
    teacher = Teacher.load(str(save(tmp_path / "teacher")), "float32")
    tokens = torch.randint(0, tiny_models.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    flat = teacher.logits(tokens).flatten(0, 1)
    index = torch.tensor([0, 8, 9, 26])
    torch.testing.assert_close(teacher.rows(tokens)(index), flat[index])


def test_the_model_case_is_recognised(tmp_path: Path) -> None:
    teacher = Teacher.load(str(tiny_models.save_moe_teacher(tmp_path / "teacher")))
    assert teacher.architecture == "Ernie4_5_MoeForCausalLM"
    assert (teacher.vocabulary_size, teacher.context_tokens) == (tiny_models.VOCABULARY, 128)
    assert teacher.model.dtype == native_dtype()


def test_an_architecture_that_caps_its_logits_is_still_read_exactly(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    teacher = Teacher("gemma", transformers.Gemma2ForCausalLM(config), tiny_models.tokenizer())
    tokens = torch.arange(20).reshape(2, 10)
    rows = teacher.rows(tokens)(torch.arange(20))
    assert rows.abs().max() <= 0.5
    torch.testing.assert_close(rows, teacher.logits(tokens).flatten(0, 1))


def _refused(folder: Path) -> EbbflowError:
    with pytest.raises(EbbflowError) as caught:
        Teacher.load(str(folder))
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE
    assert "transformers can load" in caught.value.cure
    return caught.value


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in str(_refused(tmp_path / "nowhere"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_llama_teacher(tmp_path / "teacher")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in str(_refused(folder))


def test_cut_off_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_llama_teacher(tmp_path / "teacher")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    _refused(folder)


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_llama_teacher(tmp_path / "teacher")
    (folder / "config.json").write_text("{")
    _refused(folder)


def test_weights_that_lack_layers_are_refused_instead_of_filled_at_random(tmp_path: Path) -> None:
    folder = tiny_models.save_llama_teacher(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "lacks" in str(_refused(folder))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_llama_teacher(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    _refused(folder)
