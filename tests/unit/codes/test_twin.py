"""The twin rounds what engines round, and training feels it."""

import dataclasses
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from code_strategies import WEIGHTS
from engine_support import KEEP, SHAPES, assert_same, random_weights, write_artefact
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ebbflow.common.codes import quantise
from ebbflow.common.codes.artefact import PRECISIONS, KVKind, Precision, read_variant, write_variant
from ebbflow.common.codes.kept import choose_kept
from ebbflow.common.codes.twin import (
    build_student,
    load_student,
    load_weights,
    quantisation_aware,
    round_activations,
    round_bf16,
    round_vectors,
    round_weight,
)
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.model import KVCache, Nothing, Student

Float32 = npt.NDArray[np.float32]


@settings(max_examples=300, deadline=None)
@given(weight=WEIGHTS)
def test_weights_are_rounded_to_what_the_codes_stand_for(weight: Float32) -> None:
    codes8, scales8 = quantise.quantise_int8(weight)
    expected8 = quantise.dequantise(codes8, scales8)
    np.testing.assert_array_equal(round_weight(torch.from_numpy(weight), "int8").numpy(), expected8)
    expected4 = quantise.dequantise(*quantise.derive_int4(codes8, scales8))
    np.testing.assert_array_equal(round_weight(torch.from_numpy(weight), "int4").numpy(), expected4)


@settings(max_examples=200, deadline=None)
@given(rows=WEIGHTS)
def test_activations_are_off_by_half_a_step_of_their_group(rows: Float32) -> None:
    rounded = round_activations(torch.from_numpy(rows)).numpy()
    grouped = rows.reshape(rows.shape[0], -1, 32).astype(np.float64)
    step = np.abs(grouped).max(axis=2, keepdims=True) / 127
    apart = np.abs(rounded.reshape(grouped.shape) - grouped)
    assert (apart <= step * (0.5 + 1e-4) + 1e-36).all()
    codes = np.divide(rounded.reshape(grouped.shape), step, out=np.zeros_like(grouped), where=step > 1e-36 / 127)
    assert np.allclose(codes, np.rint(codes), atol=1e-3), "every number is a whole number of steps"
    one_group = rows.reshape(-1, 32)
    np.testing.assert_array_equal(round_vectors(torch.from_numpy(one_group)).numpy(), rounded.reshape(-1, 32))


@given(values=hnp.arrays(np.float32, 8, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_bfloat16_is_that_of_the_artefact(values: Float32) -> None:
    expected = quantise.from_bf16(quantise.to_bf16(values))
    np.testing.assert_array_equal(round_bf16(torch.from_numpy(values)).numpy(), expected)


@pytest.mark.parametrize("round_some", [round_activations, round_vectors, round_bf16])
def test_gradients_pass_straight_through(round_some: object) -> None:
    assert callable(round_some)
    x = torch.randn(3, 64, requires_grad=True)
    weight = torch.randn(3, 64)
    (round_some(x) * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_computes_with_what_would_be_packed(tmp_path: Path, shape: str, precision: Precision) -> None:
    config = SHAPES[shape]
    weights = random_weights(config)
    student = Student.empty(config)
    student.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, assign=True)
    kept = choose_kept(config, KEEP.get(shape, ()))
    twin = quantisation_aware(student.requires_grad_(True).train(), precision, kept_bf16=kept)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    logits = twin(tokens)
    logits.square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, f"{name} is shared and learns"
        assert bool(torch.isfinite(parameter.grad).all())
    write_variant(tmp_path / "weights", weights, config, precision, kept_bf16=kept)
    with torch.no_grad():
        packed = load_student(tmp_path / "weights")(tokens)
    # Norms and biases become bfloat16 when they are packed.
    apart = (logits - packed).detach().abs().max() / packed.std()
    assert float(apart) < 0.2
    assert list(twin.state_dict()) == list(student.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_sensitive_matrices_round_as_bf16_does_and_the_others_as_codes_do(tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(SHAPES["sensitive"], tie_word_embeddings=tied)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    sensitive = head, "model.layers.0.mlp.up_proj.weight"
    twins = {
        "bf16": load_student(write_artefact(tmp_path / "bf16", config, "bf16")),
        "int4": load_student(write_artefact(tmp_path / "int4", config, "int4")),
        "kept": load_student(write_artefact(tmp_path / "kept", config, "int4", keep=sensitive)),
    }
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))

    def product(what: str, name: str) -> torch.Tensor:
        twin = twins[what]
        return twin.logits(x) if name == "head" else cast("torch.Tensor", twin.get_submodule(name)(x))

    layer = "model.layers.0."
    alike = {"head": "bf16", f"{layer}mlp.up_proj": "bf16", f"{layer}mlp.gate_proj": "bf16"}
    alike |= {f"{layer}self_attn.q_proj": "int4", "model.layers.1.mlp.up_proj": "int4"}
    for name, kind in alike.items():
        found = product("kept", name)
        assert torch.equal(found, product(kind, name)), name
        assert not torch.equal(found, product("int4" if kind == "bf16" else "bf16", name)), name
    rows = {what: twin.model.embed_tokens(torch.arange(9)) for what, twin in twins.items()}
    assert torch.equal(rows["kept"], rows["bf16" if tied else "int4"])
    assert not torch.equal(rows["bf16"], rows["int4"])


@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
def test_a_cache_holds_what_whole_sequences_look_at(tmp_path: Path, kv_cache: KVKind) -> None:
    path = write_artefact(tmp_path / "weights", SHAPES["tied"], "int8")
    twin = build_student(read_variant(path), None, kv_cache)
    tokens = torch.arange(36).reshape(12, 3)
    cache = KVCache(twin.config, 12, 3)
    with torch.no_grad():
        found = torch.cat([twin(tokens[:, :2], cache), twin(tokens[:, 2:], cache)], dim=1)
        expected = twin(tokens)
    assert_same(found.numpy(), expected.numpy())
    kept = cache._keys_LBKSD
    again = round_bf16(kept) if kv_cache == "bf16" else round_vectors(kept)
    torch.testing.assert_close(again, kept)


def test_plain_weights_round_nothing_else(tmp_path: Path) -> None:
    path = write_artefact(tmp_path / "weights", SHAPES["tied"], "int8")
    plain, twin = load_weights(path), load_student(path)
    assert type(plain) is Student
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        apart = (plain(tokens) - twin(tokens)).abs().max() / plain(tokens).std()
        hidden = (plain.hidden(tokens) - Student.hidden(plain, tokens, Nothing())).abs().max()
    assert 1e-4 < float(apart) < 0.5, "activations make the difference"
    assert float(hidden) == 0


def test_a_precision_that_the_artefact_does_not_give_is_refused(tmp_path: Path) -> None:
    path = write_artefact(tmp_path / "weights", SHAPES["tied"], "int4")
    with pytest.raises(EbbflowError, match="int8") as caught:
        build_student(read_variant(path), "int8")
    assert caught.value.reason is Reason.INVALID_REQUEST
