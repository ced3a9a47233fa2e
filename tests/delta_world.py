"""Artefacts that differ as releases do."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ebbflow.common.codes.artefact import PRECISIONS, Precision, Variant, read_variant, write_variant
from ebbflow.common.codes.quantise import Float32
from ebbflow.common.student.config import StudentConfig

CONFIG = StudentConfig(
    vocab_size=70,
    hidden_size=64,
    intermediate_size=72,  # not a multiple of 32: down_proj stays bfloat16
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    use_bias=True,
)
WIDER = replace(CONFIG, vocab_size=97)


@dataclass(frozen=True)
class Pair:
    """An old and a new file."""

    base: Path
    target: Path

    @property
    def size_bytes(self) -> int:
        return self.target.stat().st_size


def random_weights(config: StudentConfig = CONFIG, seed: int = 0) -> dict[str, Float32]:
    random = np.random.default_rng(seed)
    return {n: random.standard_normal(s, np.float32) * np.float32(0.02) for n, s in config.tensor_shapes().items()}


def median_step(variant: Variant) -> float:
    """Quantisation step of int8 in weights."""
    scales = [variant.scales(name).ravel() for name in variant.coded_in("int8")]
    return float(np.median(np.concatenate(scales).astype(np.float32)))


def moved(weights: dict[str, Float32], rms: float, seed: int = 1) -> dict[str, Float32]:
    """Weights after an update whose root mean square is `rms`."""
    random = np.random.default_rng(seed)
    return {n: w + random.standard_normal(w.shape, np.float32) * np.float32(rms) for n, w in weights.items()}


def write_pair(
    folder: Path, precision: Precision, steps: float, config: StudentConfig = CONFIG, *, kept: bool = True
) -> Pair:
    """Two releases, `steps` int8 steps of root mean square apart."""
    before = random_weights(config)
    write_variant(folder / "base8", before, config, "int8")
    scales = read_variant(folder / "base8")
    after = moved(before, steps * median_step(scales))
    write_variant(folder / "base", before, config, precision)
    write_variant(folder / "target", after, config, precision, scales if kept else None)
    return Pair(folder / "base", folder / "target")


__all__ = ["CONFIG", "PRECISIONS", "WIDER", "Pair", "median_step", "moved", "random_weights", "write_pair"]
