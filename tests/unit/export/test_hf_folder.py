"""The Hugging Face folder: transformers loads it and computes the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_world as world
import pytest
import torch
import transformers

from ebbflow.common.codes.artefact import PRECISIONS, Precision
from ebbflow.common.export.hf_folder import write_hf
from ebbflow.edge.serving.chat import Message, transcript

Released = Callable[[str], Path]


def exported(released: Released, shape: str, precision: Precision, folder: Path) -> Path:
    write_hf(world.source(released(shape), precision), folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_transformers_computes_the_same_logits(
    released: Released, shape: str, precision: Precision, tmp_path: Path
) -> None:
    folder = exported(released, shape, precision, tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "Ernie4_5ForCausalLM"
    ids = list(range(3, 40))
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0]
    wanted = world.logits(world.plain(released(shape) / f"{precision}.safetensors"), ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_weights_keep_the_bits_that_they_need(released: Released, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    for precision, dtype in (("bf16", torch.bfloat16), ("int4", torch.float32)):
        (tmp_path / precision).mkdir()
        loaded: Any = auto.from_pretrained(exported(released, "tied", precision, tmp_path / precision), dtype="auto")  # type: ignore[arg-type]
        assert loaded.dtype is dtype


def test_texts_and_chats_begin_as_on_a_device(released: Released, tmp_path: Path) -> None:
    folder = exported(released, "tied", "int8", tmp_path)
    loaded: Any = transformers.AutoTokenizer.from_pretrained(folder)
    ours = world.source(released("tied"), "int8").tokenizer
    for text in (*world.PROMPTS, world.TEXT, "", " \n\n x  ", "🦊日"):
        assert loaded(text)["input_ids"] == ours.encode(text, bos=True)
        assert loaded.decode(ours.encode(text)) == text
    said = [("system", "Be brief."), ("developer", "Be kind."), ("user", "Hi!"), ("assistant", "Yes?"), ("user", "Bye")]
    chat = [{"role": role, "content": text} for role, text in said]
    rendered = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    messages: Any = [Message(role, text) for role, text in said]  # type: ignore[arg-type]
    assert rendered == "<s>" + transcript(messages)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (ours.eos_id, ours.pad_id)


def test_a_tokenizer_without_a_beginning_gets_none(released: Released, tmp_path: Path) -> None:
    parsed = json.loads((released("tied") / "tokenizer.json").read_bytes())
    text = json.dumps(parsed).replace('"<s>"', '"<start>"')
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "int8.safetensors").write_bytes((released("tied") / "int8.safetensors").read_bytes())
    source = world.source(tmp_path, "int8")
    assert source.tokenizer.bos_id is None
    write_hf(source, tmp_path / "hf")
    loaded: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("The tide")["input_ids"] == source.tokenizer.encode("The tide")
    chat = [{"role": "user", "content": "Hi!"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "User: Hi!\n"
