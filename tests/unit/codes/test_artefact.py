"""Artefacts: what is written is read, and what is damaged is refused."""

import dataclasses
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.common.codes import artefact, quantise
from ebbflow.common.codes.artefact import PRECISIONS, Precision, read_variant, weights, write_variant
from ebbflow.common.codes.quantise import Float32
from ebbflow.common.codes.twin import load_student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig

CONFIG = StudentConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=72,  # not a multiple of 32: down_proj stays bfloat16
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    use_bias=True,
)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def random_weights(config: StudentConfig, seed: int = 0) -> dict[str, Float32]:
    generator = np.random.default_rng(seed)
    return {n: generator.standard_normal(s, np.float32) * np.float32(0.1) for n, s in config.tensor_shapes().items()}


def expected_weight(weight: Float32, precision: Precision) -> Float32:
    if precision == "bf16" or not quantise.can_code(weight.shape):
        return quantise.from_bf16(quantise.to_bf16(weight))
    codes, scales = quantise.quantise_int8(weight)
    return quantise.dequantise(*(quantise.derive_int4(codes, scales) if precision == "int4" else (codes, scales)))


@every_precision
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read(
    tmp_path: Path, precision: Precision, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artefact, "_BLOCK_WEIGHTS", 64 * 7)  # several blocks, the last one shorter
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    written = random_weights(config)
    write_variant(tmp_path / "weights", written, config, precision)
    variant = read_variant(tmp_path / "weights")
    assert (variant.config, variant.precision) == (config, precision)
    found = weights(tmp_path / "weights")
    assert list(found) == list(config.tensor_shapes())
    for name, weight in written.items():
        np.testing.assert_array_equal(found[name], expected_weight(weight, precision), err_msg=name)


@every_precision
def test_the_same_weights_give_the_same_bytes(tmp_path: Path, precision: Precision) -> None:
    written = random_weights(CONFIG)
    write_variant(tmp_path / "one", written, CONFIG, precision)
    write_variant(tmp_path / "two", dict(reversed(written.items())), CONFIG, precision)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@every_precision
def test_the_safetensors_library_reads_the_file(tmp_path: Path, precision: Precision) -> None:
    write_variant(tmp_path / "weights", random_weights(CONFIG), CONFIG, precision)
    ours = read_variant(tmp_path / "weights").tensors
    theirs = safetensors.torch.load_file(tmp_path / "weights")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        raw = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(ours[name], raw.numpy(), err_msg=name)


def test_sizes_are_those_of_the_codes(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=20_000, use_bias=False, intermediate_size=96)
    sizes = {}
    for precision in PRECISIONS:
        write_variant(tmp_path / precision, random_weights(config), config, precision)
        sizes[precision] = (tmp_path / precision).stat().st_size / config.parameters
    assert sizes["bf16"] == pytest.approx(2, rel=0.01)
    assert sizes["int8"] == pytest.approx(1 + 2 / 32, rel=0.01)
    assert sizes["int4"] == pytest.approx(0.5 + 2 / 32, rel=0.01)


@every_precision
def test_the_twin_has_exactly_these_weights(tmp_path: Path, precision: Precision) -> None:
    write_variant(tmp_path / "weights", random_weights(CONFIG), CONFIG, precision)
    student = load_student(tmp_path / "weights")
    for name, weight in weights(tmp_path / "weights").items():
        np.testing.assert_array_equal(student.state_dict()[name].numpy(), weight, err_msg=name)
    assert not any(parameter.requires_grad for parameter in student.parameters())


class Lazy(Mapping[str, Float32]):
    """Makes each tensor when it is asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> Float32:
        return np.ones(self._shapes[name], np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def test_writing_holds_one_tensor_and_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "_BLOCK_WEIGHTS", 1 << 16)
    config = dataclasses.replace(CONFIG, vocab_size=40_000, tie_word_embeddings=False)
    largest_bytes = config.vocab_size * config.hidden_size * 4
    tracemalloc.start()
    try:
        write_variant(tmp_path / "weights", Lazy(config.tensor_shapes()), config, "int4")
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < largest_bytes * 1.4


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "nan", "bias"])
def test_weights_that_do_not_fit_are_refused_and_leave_no_file(tmp_path: Path, change: str) -> None:
    written = random_weights(CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del written[name]
    elif change == "unknown":
        written["model.layers.2.mlp.up_proj.weight"] = written[name]
    elif change == "shape":
        written[name] = written[name][1:]
    elif change == "nan":
        written[name][3, 4] = np.nan
    else:
        name = "model.layers.0.self_attn.q_proj.bias"
        written[name][3] = np.inf
    with pytest.raises(EbbflowError) as caught:
        write_variant(tmp_path / "weights", written, CONFIG, "int8")
    assert caught.value.reason is Reason.WEIGHTS_INVALID
    assert "proj" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def refused(path: Path) -> None:
    with pytest.raises(EbbflowError) as caught:
        weights(path)
    assert caught.value.reason is Reason.FILE_CORRUPT


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "weights"
    write_variant(path, random_weights(CONFIG), CONFIG, "int4")
    return path.read_bytes()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_a_file_cut_short_is_refused(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "cut"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(path)


def test_a_file_that_is_longer_or_missing_or_foreign_is_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "longer").write_bytes(whole + b"\0")
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "foreign")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "float32")
    for name in ("longer", "missing", "foreign", "float32"):
        refused(tmp_path / name)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_a_damaged_header_never_ends_in_another_error(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    length = int.from_bytes(whole[:8], "little")
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    try:
        weights(path)  # a changed digit of the rope's base, say, is for the hash of the whole file to notice
    except EbbflowError as error:
        assert error.reason is Reason.FILE_CORRUPT  # noqa: PT017 - most damage is refused, some cannot be


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["dtype", "shape", "data_offsets", "__metadata__", "format", "precision", "config", "a", "x.codes"]
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    header=JSON | st.dictionaries(FIELDS, JSON | st.dictionaries(FIELDS, JSON, max_size=4), max_size=4),
    tail=st.binary(max_size=64),
)
def test_a_header_of_any_json_is_refused(tmp_path: Path, header: object, tail: bytes) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "strange"
    path.write_bytes(len(text).to_bytes(8, "little") + text + tail)
    refused(path)


def with_header(whole: bytes, old: str, new: str) -> bytes:
    length = int.from_bytes(whole[:8], "little")
    text = whole[8 : 8 + length].decode()
    assert old in text
    changed = text.replace(old, new).encode()
    return len(changed).to_bytes(8, "little") + changed + whole[8 + length :]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ebbflow.artefact/1", "ebbflow.artefact/2"),
        ('"precision":"int4"', '"precision":"int3"'),
        ('"precision":"int4"', '"precision":"int8"'),
        ('\\"vocab_size\\":50', '\\"vocab_size\\":51'),
        ('\\"num_hidden_layers\\":2', '\\"num_hidden_layers\\":1024'),
        ('\\"hidden_act\\":\\"silu\\"', '\\"hidden_act\\":\\"gelu\\"'),
        ('\\"use_bias\\":true', '\\"use_bias\\":false'),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(whole: bytes, tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "weights").write_bytes(with_header(whole, old, new))
    refused(tmp_path / "weights")


@pytest.mark.parametrize(
    ("precision", "tensor", "wrong"),
    [
        ("int8", "model.norm.weight", b"\x80\x7f"),
        ("bf16", "model.norm.weight", b"\xc0\xff"),
        ("int8", "model.embed_tokens.weight.scales", b"\x00\x7c"),
        ("int4", "model.embed_tokens.weight.scales", b"\x00\x7e"),
        ("int4", "model.embed_tokens.weight.scales", b"\x00\x80"),
        ("int8", "model.embed_tokens.weight.codes", b"\x80"),
        ("int4", "model.embed_tokens.weight.codes", b"\x08"),
    ],
)
def test_numbers_that_no_code_stands_for_are_refused(
    tmp_path: Path, precision: Precision, tensor: str, wrong: bytes
) -> None:
    path = tmp_path / "weights"
    write_variant(path, random_weights(CONFIG), CONFIG, precision)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin = 8 + length + json.loads(content[8 : 8 + length])[tensor]["data_offsets"][0]
    content[begin : begin + len(wrong)] = wrong
    path.write_bytes(content)
    refused(path)


def test_reading_needs_no_torch() -> None:
    modules = "ebbflow.common.codes.artefact, ebbflow.common.student.tokens"
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )
