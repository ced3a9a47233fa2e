"""Students that stretch the kernels, and what it means that two engines agree."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ebbflow.common.codes.artefact import KVKind, Precision, read_variant, write_variant
from ebbflow.common.codes.kept import choose_kept
from ebbflow.common.codes.quantise import Float32
from ebbflow.common.codes.twin import build_student
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.edge.engine.base import Logits
from ebbflow.edge.engine.library import find_library

SHAPES = {
    # Heads whose width is not a multiple of 16; several query heads to a key head.
    "tied": StudentConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=256,
    ),
    # Biases, a head of its own, a vocabulary that does not fill its last block, and one matrix that is not coded.
    "biased": StudentConfig(
        vocab_size=515,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        use_bias=True,
        tie_word_embeddings=False,
        rope_theta=10_000.0,
    ),
    # Almost nothing is coded, and query, key and value end within a block of 16 rows.
    "uneven": StudentConfig(
        vocab_size=67,
        hidden_size=40,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=256,
    ),
    # Coded matrices beside sensitive ones, which are kept in bfloat16.
    "sensitive": StudentConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        use_bias=True,
    ),
}
KEEP = {"sensitive": ("model.embed_tokens.*", "model.layers.0.self_attn.k_proj.*", "model.layers.1.mlp.down_proj.*")}
"""Patterns of sensitive matrices by the shape that has some."""
INSTRUCTION_SETS = ("avx512", "avxvnni", "avx2", "i8mm", "dotprod", "portable")


def instruction_sets() -> list[str]:
    """Those that this machine has, best first; none without the library."""
    library = find_library()
    if library is None:
        return []
    usable = [name for name in INSTRUCTION_SETS if library.ebb_use_isa(name.encode()) == 0]
    use_instruction_set(usable[0])
    return usable


def use_instruction_set(name: str) -> None:
    """Lets engines that are loaded from now on compute with an instruction set of this machine."""
    library = find_library()
    assert library is not None
    assert library.ebb_use_isa(name.encode()) == 0


def random_weights(config: StudentConfig, seed: int = 1, std: float = 0.15) -> dict[str, Float32]:
    """Weights whose norms and biases are not trivial either."""
    tensors = {name: tensor.numpy() for name, tensor in Student.random(config, seed, std=std).state_dict().items()}
    rng = np.random.default_rng(seed)
    return {
        name: tensor if tensor.ndim > 1 else tensor + rng.uniform(-0.4, 0.4, tensor.shape).astype(np.float32)
        for name, tensor in tensors.items()
    }


def write_artefact(
    path: Path, config: StudentConfig, precision: Precision, seed: int = 1, keep: Sequence[str] = ()
) -> Path:
    """Writes an artefact of random weights; returns its path."""
    weights = random_weights(config, seed)
    write_variant(path, weights, config, precision, kept_bf16=choose_kept(config, keep))
    return path


def write_shape(path: Path, shape: str, precision: Precision) -> Path:
    """Writes an artefact of one of `SHAPES`, with its sensitive matrices; returns its path."""
    return write_artefact(path, SHAPES[shape], precision, keep=KEEP.get(shape, ()))


def twin_logits(
    path: Path, token_ids: list[list[int]], precision: Precision | None = None, kv_cache: KVKind = "bf16"
) -> Logits:
    """Returns what the twin computes of sequences of one length, [B, T, V]."""
    twin = build_student(read_variant(path), precision, kv_cache)
    with torch.inference_mode():
        logits_BTV: Logits = twin(torch.tensor(token_ids)).numpy()
    return logits_BTV


def assert_same(found: Logits, expected: Logits) -> None:
    """Holds that two engines compute the same, to float tolerance.

    Sums in another order differ in their last bits, and now and then such a bit rounds an activation to the
    neighbouring code; what follows then differs by a step of 1/127 somewhere. So nearly everything must agree to a few
    bits, and the rest to some hundredths of the logits' spread.
    """
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    apart = np.abs(found - expected).max(axis=-1) / np.std(expected)
    assert np.median(apart) < 1e-5
    assert_alike(found, expected)


def assert_alike(found: Logits, expected: Logits) -> None:
    """Holds that two engines compute the same where such steps have piled up over a long sequence."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.3 * np.std(expected)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * np.std(expected)
