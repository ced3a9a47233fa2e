"""The student computes what transformers' Ernie4_5ForCausalLM computes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5RotaryEmbedding

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.checkpoint import load_checkpoint, save_checkpoint
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import KVCache, Student, rotation

SMALL = StudentConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
SHAPES = {
    "tied": SMALL,
    "untied": dataclasses.replace(SMALL, tie_word_embeddings=False),
    "bias": dataclasses.replace(SMALL, use_bias=True, tie_word_embeddings=False),
    "one key head, wide heads": dataclasses.replace(SMALL, num_key_value_heads=1, head_dim=24),
    "no groups, small base": dataclasses.replace(SMALL, num_key_value_heads=4, rope_theta=10_000.0, rms_norm_eps=1e-3),
    "eight to one": dataclasses.replace(SMALL, num_attention_heads=8, num_key_value_heads=1, num_hidden_layers=1),
}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES), scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Student, Ernie4_5ForCausalLM]:
    """A reference with large random weights, and what we load of its checkpoint."""
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    reference = Ernie4_5ForCausalLM(Ernie4_5Config(**request.param.to_hf())).train(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    reference.save_pretrained(folder)
    student = load_checkpoint(folder)
    assert student.config == request.param
    return student, reference


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_logits_agree_with_transformers(pair: tuple[Student, Ernie4_5ForCausalLM]) -> None:
    student, reference = pair
    tokens_BT = tokens(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(student(tokens_BT), reference(tokens_BT).logits, atol=1e-4, rtol=0)


def test_logits_in_pieces_agree_with_transformers(pair: tuple[Student, Ernie4_5ForCausalLM]) -> None:
    student, reference = pair
    tokens_BT = tokens(2, 24)
    cache = KVCache(student.config, batch=2, capacity_tokens=24)
    with torch.no_grad():
        pieces = [student(piece, cache) for piece in torch.split(tokens_BT, [7, 1, 1, 5, 1, 9], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), reference(tokens_BT).logits, atol=1e-4, rtol=0)
    assert cache.length == 24


def test_positions_far_out_agree_with_transformers() -> None:
    config = dataclasses.replace(SMALL, max_position_embeddings=1 << 20, rope_theta=10_000.0, head_dim=16)
    theirs = Ernie4_5RotaryEmbedding(Ernie4_5Config(**config.to_hf()))
    positions = torch.tensor([0, 1, 131_071, 1_000_000])
    cosine, sine = rotation(config, positions)
    expected_cosine, expected_sine = theirs(torch.zeros(1), positions[None])
    torch.testing.assert_close(cosine, expected_cosine[0, :, :8], atol=1e-6, rtol=0)
    torch.testing.assert_close(sine, expected_sine[0, :, :8], atol=1e-6, rtol=0)


def test_a_full_cache_takes_no_more() -> None:
    student, cache = Student.random(SMALL, seed=0), KVCache(SMALL, batch=1, capacity_tokens=4)
    with torch.no_grad():
        student(tokens(1, 4), cache)
        with pytest.raises(EbbflowError) as caught:
            student(tokens(1, 1), cache)
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    assert cache.length == 4


def test_gradients_agree_with_transformers(pair: tuple[Student, Ernie4_5ForCausalLM]) -> None:
    student, reference = pair
    tokens_BT = tokens(2, 16) % (SMALL.vocab_size - 1) + 1  # transformers gives the padding token's row no gradient
    weight_BTV = torch.randn(2, 16, SMALL.vocab_size, generator=torch.Generator().manual_seed(2))
    (student(tokens_BT) * weight_BTV).mean().backward()
    (reference(tokens_BT).logits * weight_BTV).mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-3)


def test_padding_on_the_right_changes_nothing_on_its_left(pair: tuple[Student, Ernie4_5ForCausalLM]) -> None:
    student, _ = pair
    tokens_BT = tokens(2, 12)
    padded_BT = torch.cat([tokens_BT, torch.zeros(2, 5, dtype=torch.long)], 1)
    with torch.no_grad():
        torch.testing.assert_close(student(padded_BT)[:, :12], student(tokens_BT), atol=1e-5, rtol=0)


def test_transformers_loads_what_we_save(pair: tuple[Student, Ernie4_5ForCausalLM], tmp_path: Path) -> None:
    student, _ = pair
    save_checkpoint(student, tmp_path)
    loading: Any = Ernie4_5ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = loading
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BT = tokens(1, 10)
    with torch.no_grad():
        torch.testing.assert_close(student(tokens_BT), loaded(tokens_BT).logits, atol=1e-4, rtol=0)


def test_a_random_student_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = Student.random(SMALL, seed=5)
    torch.manual_seed(2)
    second, third = Student.random(SMALL, seed=5), Student.random(SMALL, seed=6)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.head_weight, third.head_weight)
    assert first.head_weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_parameters_are_counted_as_torch_counts_them() -> None:
    for config in SHAPES.values():
        student = Student.empty(config)
        assert {name: tuple(t.shape) for name, t in student.state_dict().items()} == config.tensor_shapes()
        assert sum(p.numel() for p in student.parameters()) == config.parameters


def test_mixed_precision_training_keeps_float32_gradients() -> None:
    student = Student.random(dataclasses.replace(SMALL, use_bias=True), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = student(tokens(2, 8))
    logits_BTV.float().logsumexp(-1).sum().backward()
    assert logits_BTV.dtype == torch.bfloat16
    for parameter in student.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
