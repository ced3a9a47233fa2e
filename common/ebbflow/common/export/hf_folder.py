"""A Hugging Face folder: what transformers loads as `Ernie4_5ForCausalLM`.

bf16 stays as it is. Codes are written as the float32 numbers that they stand for, exactly; in fewer bits they would
not be the same weights.
"""

import json
import math
from pathlib import Path
from typing import BinaryIO

from ebbflow.common.codes import artefact, quantise
from ebbflow.common.codes.container import write_blocks
from ebbflow.common.export.source import Source, bf16_bits, staged
from ebbflow.common.export.tokenizer_files import write_json, write_tokenizer
from ebbflow.common.files import atomic

_BYTES = {"BF16": 2, "F32": 4}
_ALIGNMENT_BYTES = 8


def write_hf(source: Source, out: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer, holding a block of rows in memory at a time.

    Args:
        source: the release.
        out: the folder; must not exist.

    Raises:
        EbbflowError: FILE_CORRUPT if the weights hold numbers that no code stands for; CHECKPOINT_UNREADABLE if the
            tokenizer cannot be read; ALREADY_EXISTS, DISK_FULL.
    """
    dtype = "BF16" if source.variant.precision == "bf16" else "F32"
    with staged(out) as folder:
        folder.mkdir()
        word = "bfloat16" if dtype == "BF16" else "float32"
        write_json(folder / "config.json", {**source.config.to_hf(), "dtype": word})
        write_tokenizer(source, folder)
        with atomic(folder / "model.safetensors", mode=0o644) as file:
            file.write(_header(source, dtype))
            for name in source.config.tensor_shapes():
                _write_tensor(file, source.variant, name, dtype)


def _header(source: Source, dtype: str) -> bytes:
    """The beginning of a safetensors file; our own reader's has no float32."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in source.config.tensor_shapes().items():
        end = offset + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, variant: artefact.Variant, name: str, dtype: str) -> None:
    shape = variant.config.tensor_shapes()[name]
    if variant.is_coded(name):
        pieces = (variant.codes(name, begin, end) for begin, end in artefact.blocks(shape))
        write_blocks(file, (quantise.dequantise(codes_OI, scales_OG) for codes_OI, scales_OG in pieces))
    else:
        bits = bf16_bits(variant, name)
        write_blocks(file, [bits if dtype == "BF16" else quantise.from_bf16(bits)])
