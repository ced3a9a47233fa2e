"""GGUF: what an independent reader finds in the file is the release, number by number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_world as world
import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ebbflow.common.codes import quantise
from ebbflow.common.codes.artefact import PRECISIONS, Precision
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.export.gguf_blocks import q4_0, q8_0
from ebbflow.common.export.gguf_file import tensor_name, write_gguf

Released = Callable[[str], Path]
SCALES = st.floats(min_value=0, max_value=3600, width=16)


@st.composite
def coded(draw: st.DrawFn, most: int) -> tuple[quantise.Int8, quantise.Float16]:
    rows, groups = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    codes_OI = draw(hnp.arrays(np.int8, (rows, groups * 32), elements=st.integers(-most, most)))
    return codes_OI, draw(hnp.arrays(np.float16, (rows, groups), elements=SCALES))


@given(coded(quantise.INT8_MOST))
def test_blocks_of_int8_are_the_same_numbers_to_ggml(matrix: tuple[quantise.Int8, quantise.Float16]) -> None:
    found = gguf.quants.dequantize(q8_0(*matrix), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(found, quantise.dequantise(*matrix))


@given(coded(quantise.INT4_MOST))
def test_blocks_of_int4_are_the_same_numbers_to_ggml(matrix: tuple[quantise.Int8, quantise.Float16]) -> None:
    found = gguf.quants.dequantize(q4_0(*matrix), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(found, quantise.dequantise(*matrix))


def exported(released: Released, shape: str, precision: Precision, folder: Path) -> Any:
    path = folder / "faq.gguf"
    write_gguf(world.source(released(shape), precision), path)
    return gguf.GGUFReader(path)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_tensor_of_the_release_is_in_the_file(
    released: Released, shape: str, precision: Precision, tmp_path: Path
) -> None:
    found = {tensor.name: tensor for tensor in exported(released, shape, precision, tmp_path).tensors}
    variant = world.source(released(shape), precision).variant
    assert set(found) == {tensor_name(name) for name in variant.config.tensor_shapes()}
    for name in variant.config.tensor_shapes():
        tensor = found[tensor_name(name)]
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(numbers, variant.weight(name)), name


def kinds(reader: Any) -> dict[str, set[str]]:
    by_kind: dict[str, set[str]] = {}
    for tensor in reader.tensors:
        by_kind.setdefault(tensor.tensor_type.name, set()).add(tensor.name)
    return by_kind


def test_codes_stay_codes_and_vectors_are_float32(released: Released, tmp_path: Path) -> None:
    assert set(kinds(exported(released, "tied", "int4", tmp_path))) == {"Q4_0", "F32"}
    (tmp_path / "8").mkdir()
    assert set(kinds(exported(released, "tied", "int8", tmp_path / "8"))) == {"Q8_0", "F32"}


def test_what_cannot_be_coded_is_bfloat16(released: Released, tmp_path: Path) -> None:
    by_kind = kinds(exported(released, "narrow", "int4", tmp_path))
    assert "token_embd.weight" in by_kind["BF16"]
    assert by_kind["Q4_0"] == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}


def test_sensitive_matrices_are_bfloat16_beside_codes(released: Released, tmp_path: Path) -> None:
    by_kind = kinds(exported(released, "sensitive", "int4", tmp_path))
    attention = {f"blk.0.attn_{letter}.weight" for letter in "qkv"} | {"blk.0.attn_output.weight"}
    assert by_kind["BF16"] == attention | {"output.weight", "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"}
    assert {"token_embd.weight", "blk.0.ffn_up.weight", "blk.1.attn_q.weight"} < by_kind["Q4_0"]


def test_the_shape_is_told_in_the_keys_that_llama_cpp_reads(released: Released, tmp_path: Path) -> None:
    fields = exported(released, "tied", "int4", tmp_path).fields
    found = {name: field.contents() for name, field in fields.items() if name.startswith("ernie4_5.")}
    assert found == {
        "ernie4_5.vocab_size": 400,
        "ernie4_5.context_length": 256,
        "ernie4_5.embedding_length": 64,
        "ernie4_5.block_count": 2,
        "ernie4_5.feed_forward_length": 96,
        "ernie4_5.attention.head_count": 4,
        "ernie4_5.attention.head_count_kv": 2,
        "ernie4_5.attention.key_length": 16,
        "ernie4_5.attention.value_length": 16,
        "ernie4_5.rope.dimension_count": 16,
        "ernie4_5.rope.freq_base": 10_000.0,
        "ernie4_5.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    }
    assert fields["general.name"].contents() == "faq/3"


def test_a_student_with_biases_is_a_llama_because_ernie_has_none_there(released: Released, tmp_path: Path) -> None:
    fields = exported(released, "biased", "int8", tmp_path).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.rope.dimension_count"].contents() == 16


def test_the_tokenizer_comes_with_its_special_tokens(released: Released, tmp_path: Path) -> None:
    fields = exported(released, "tied", "int4", tmp_path).fields
    tokenizer = world.source(released("tied"), "int4").tokenizer
    tokens, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert (len(tokens), tokens[:3], types[:3]) == (400, ["<pad>", "<s>", "</s>"], [3, 3, 3])
    assert {text: at for at, text in enumerate(tokens[: tokenizer.size])} == tokenizer.vocabulary()
    assert set(types[tokenizer.size :]) == {5}
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_id
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_nothing_is_written_over_and_a_failure_leaves_nothing(released: Released, tmp_path: Path) -> None:
    source = world.source(released("tied"), "int4")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(EbbflowError) as caught:
        write_gguf(source, tmp_path / "there.gguf")
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert (tmp_path / "there.gguf").read_text() == "mine"
    broken = dict(source.variant.tensors)
    broken["model.norm.weight"] = np.full(64, 0x7FC0, np.uint16)
    object.__setattr__(source.variant, "tensors", broken)
    with pytest.raises(EbbflowError) as caught:
        write_gguf(source, tmp_path / "new.gguf")
    assert caught.value.reason is Reason.FILE_CORRUPT
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_a_folder_that_cannot_be_written_is_named(released: Released) -> None:
    with pytest.raises(EbbflowError) as caught:
        write_gguf(world.source(released("tied"), "int4"), Path("/proc/nowhere/faq.gguf"))
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert "/proc/nowhere" in str(caught.value)
