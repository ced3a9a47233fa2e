"""Writes a student of random weights in every form that an engine reads; kept between runs.

Run as `python -m speed.models SHAPE` by `folder`, so that the measuring process never holds weights.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
from rivals import environments
from speed.shapes import CONTEXT_TOKENS, RMS_NORM_EPS, ROPE_THETA, SHAPES, Shape

from ebbflow.common.codes.artefact import FORMAT, read_variant, write_variant
from ebbflow.common.codes.quantise import Float32
from ebbflow.common.export.gguf_file import write_gguf
from ebbflow.common.export.hf_folder import write_hf
from ebbflow.common.export.source import Source
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.tokens import Tokenizer

ARTEFACT, GGUF, TOKENIZER, HF, TORCH = "int4.safetensors", "q4_0.gguf", "tokenizer.json", "hf", "torch-int4.pt"
_BF16 = "bf16.safetensors"
_STD = 0.02
_LAYOUT = 2
"""Changes when this module writes something else."""


def folder(shape: Shape) -> Path:
    """The folder of a shape's files, written the first time.

    Raises:
        subprocess.CalledProcessError: They could not be written.
    """
    wanted = hashlib.sha256(f"{shape} {_LAYOUT} {FORMAT} {CONTEXT_TOKENS}".encode()).hexdigest()[:12]
    home = environments.folder() / f"student-{shape.name}-{wanted}"
    if not (home / "written").exists():
        print(f"writing a student of shape {shape.name} to {home}", file=sys.stderr, flush=True)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        given = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        subprocess.run([sys.executable, "-m", "speed.models", shape.name, str(home)], check=True, env=given)
        (home / "written").touch()
    return home


def config(shape: Shape) -> StudentConfig:
    """The shape as the product knows it."""
    return StudentConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_theta=ROPE_THETA,
        rms_norm_eps=RMS_NORM_EPS,
    )


def _write(shape: Shape, home: Path) -> None:
    tokenizer = _train_tokenizer(shape.vocab_size)
    tokenizer.save(home / TOKENIZER)
    tensors = _random_weights(config(shape))
    write_variant(home / ARTEFACT, tensors, config(shape), "int4")
    write_variant(home / _BF16, tensors, config(shape), "bf16")
    write_gguf(Source.read(home / ARTEFACT, home / TOKENIZER, shape.name), home / GGUF)
    write_hf(Source.read(home / _BF16, home / TOKENIZER, shape.name), home / HF)
    _write_torch(home, shape)


def _train_tokenizer(size: int) -> Tokenizer:
    """Byte-level BPE over Python's standard library, which every machine has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    tokenizer = Tokenizer.train((path.read_text(errors="ignore") for path in files), size)
    if tokenizer.size != size:
        raise ValueError(f"the standard library gave {tokenizer.size} tokens where {size} are needed")
    return tokenizer


def _random_weights(of: StudentConfig) -> dict[str, Float32]:
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape, np.float32) * np.float32(_STD) if len(shape) > 1 else np.ones(shape, "f4")
        for name, shape in of.tensor_shapes().items()
    }


def _write_torch(home: Path, shape: Shape) -> None:
    """The same codes as torch's INT4 kernel for CPUs packs them: groups of 32, scales in bfloat16."""
    import torch

    variant = read_variant(home / ARTEFACT)
    packed: dict[str, torch.Tensor] = {}
    for name, sizes in variant.config.tensor_shapes().items():
        if len(sizes) == 1:
            packed[name] = torch.from_numpy(variant.weight(name)).bfloat16()
            continue
        codes_OI, scales_OG = variant.codes(name, 0, sizes[0])
        unsigned_OI = torch.from_numpy(codes_OI.astype(np.int32) + 8)
        scales_GO = torch.from_numpy(scales_OG.astype(np.float32)).T
        packed[f"{name}.packed"] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned_OI, 2)
        packed[f"{name}.scales"] = torch.stack([scales_GO, torch.zeros_like(scales_GO)], -1).bfloat16().contiguous()
    embedding = torch.from_numpy(variant.weight("model.embed_tokens.weight")).bfloat16()
    torch.save({**packed, "embedding": embedding}, home / TORCH)


if __name__ == "__main__":
    _write(SHAPES[sys.argv[1]], Path(sys.argv[2]))
