"""The artefact of a variant: one safetensors file for bf16, int8 and int4 alike, with the student's configuration.

A coded matrix NAME is kept as NAME.codes (int8 [O, I], or uint8 [O, I/2] of nibbles) and NAME.scales (float16 [O, G]);
every other tensor as bfloat16 under its own name. Which matrices are coded follows from their shapes alone.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import numpy as np

from ebbflow.common.codes import container, quantise
from ebbflow.common.codes.container import Array, Entry
from ebbflow.common.codes.quantise import Float32
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import atomic
from ebbflow.common.student.config import StudentConfig

Precision = Literal["bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FORMAT = "ebbflow.artefact/1"
CODES, SCALES = ".codes", ".scales"

# Rows are worked on in blocks of about this many weights, so that memory does not grow with the model.
_BLOCK_WEIGHTS = 1 << 21


@dataclass(frozen=True)
class Variant:
    """What an artefact holds, mapped into memory and not yet de-quantised.

    Attributes:
        tensors: read-only arrays by their names in the file; bfloat16 as uint16.
        config: shape of the student.
        precision: of the coded matrices.
    """

    tensors: dict[str, Array]
    config: StudentConfig
    precision: Precision

    def weight(self, name: str) -> Float32:
        """De-quantises one tensor, by its Hugging Face name.

        Raises:
            EbbflowError: FILE_CORRUPT if it holds numbers that no code stands for.
        """
        shape = self.config.tensor_shapes()[name]
        if not is_coded(shape, self.precision):
            return _checked_bf16(self.tensors[name], name)
        weight_OI = np.empty(shape, np.float32)
        for begin, end in _blocks(shape):
            codes_OI, scales_OG = self._codes(name, begin, end)
            weight_OI[begin:end] = quantise.dequantise(codes_OI, scales_OG)
        return weight_OI

    def _codes(self, name: str, begin: int, end: int) -> tuple[quantise.Int8, quantise.Float16]:
        """Unpacked codes and scales of some rows."""
        codes_OI, scales_OG = self.tensors[name + CODES][begin:end], self.tensors[name + SCALES][begin:end]
        most = quantise.INT8_MOST
        if self.precision == "int4":
            codes_OI, most = quantise.unpack_nibbles(codes_OI), quantise.INT4_MOST
        finite = bool(np.isfinite(scales_OG).all()) and not bool(np.signbit(scales_OG).any())
        if not finite or int(codes_OI.min()) < -most or int(codes_OI.max()) > most:
            raise _corrupt(name)
        return codes_OI, scales_OG


def is_coded(shape: tuple[int, ...], precision: Precision) -> bool:
    """Says whether a tensor of this shape is kept as codes."""
    return precision != "bf16" and quantise.can_code(shape)


def write_variant(path: Path, tensors: Mapping[str, Float32], config: StudentConfig, precision: Precision) -> None:
    """Writes the artefact of one precision, atomically; the same weights give the same bytes.

    Holds one block of rows beside what `tensors` holds, so a mapping that loads on demand keeps memory flat.

    Args:
        path: the file; replaced if it exists.
        tensors: float32 weights by Hugging Face name: all of `config.tensor_shapes()` and no other.
        config: shape of the student.
        precision: "int4" derives its codes from the INT8 codes.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a weight is missing, misshapen, not finite or too large; DISK_FULL.
    """
    shapes = config.tensor_shapes()
    for name in sorted(shapes.keys() ^ tensors.keys()):
        raise EbbflowError(Reason.WEIGHTS_INVALID, f"tensor {name!r} is {'missing' if name in shapes else 'not known'}")
    metadata = {
        "format": FORMAT,
        "precision": precision,
        "config": json.dumps(config.to_hf(), sort_keys=True, separators=(",", ":")),
    }
    with atomic(path, mode=0o644) as file:
        file.write(container.encode_header(_stored(config, precision), metadata))
        for name, shape in shapes.items():
            weight = np.asarray(tensors[name], np.float32)
            if weight.shape != shape:
                raise EbbflowError(Reason.WEIGHTS_INVALID, f"{name!r} has shape {weight.shape}, not {shape}")
            _write_tensor(file, weight, precision, name)


def read_variant(path: Path) -> Variant:
    """Maps an artefact into memory and checks that it holds exactly the tensors of its configuration.

    Raises:
        EbbflowError: FILE_CORRUPT if it is missing, cut short, malformed or of another format.
    """
    tensors, metadata = container.read(path)
    try:
        config = StudentConfig.from_hf(json.loads(metadata["config"]))
        precision = metadata["precision"]
        if metadata["format"] != FORMAT or precision not in PRECISIONS:
            raise ValueError(FORMAT)
        # Said first, so that a configuration of huge sizes costs nothing.
        if len(tensors) < config.num_hidden_layers:
            raise ValueError("layers")
    except (KeyError, ValueError, RecursionError, EbbflowError) as error:
        raise _corrupt(path.name) from error
    variant = Variant(tensors, config, precision)
    found = {name: Entry(_dtype_name(array), array.shape) for name, array in tensors.items()}
    if found != _stored(config, variant.precision):
        raise _corrupt(path.name)
    return variant


def weights(path: Path) -> dict[str, Float32]:
    """Reads an artefact as float32 weights by Hugging Face name.

    Raises:
        EbbflowError: FILE_CORRUPT as `read_variant` and `Variant.weight` do.
    """
    variant = read_variant(path)
    return {name: variant.weight(name) for name in variant.config.tensor_shapes()}


def _corrupt(what: object) -> EbbflowError:
    return EbbflowError(Reason.FILE_CORRUPT, f"{what} is not part of a whole artefact of format {FORMAT}")


def _stored(config: StudentConfig, precision: Precision) -> dict[str, Entry]:
    """Tensors of the file, in its order."""
    entries: dict[str, Entry] = {}
    for name, shape in config.tensor_shapes().items():
        if is_coded(shape, precision):
            rows, inputs = shape
            codes = Entry("I8", shape) if precision == "int8" else Entry("U8", (rows, inputs // 2))
            entries[name + CODES] = codes
            entries[name + SCALES] = Entry("F16", (rows, inputs // quantise.GROUP))
        else:
            entries[name] = Entry("BF16", shape)
    return entries


def _dtype_name(array: Array) -> str:
    return {"u2": "BF16", "f2": "F16", "i1": "I8", "u1": "U8"}[array.dtype.str[1:]]


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows from and to, block by block."""
    step = max(1, _BLOCK_WEIGHTS // max(1, int(np.prod(shape[1:]))))
    return ((begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step))


def _write_tensor(file: BinaryIO, weight: Float32, precision: Precision, name: str) -> None:
    try:
        if is_coded(weight.shape, precision):
            _write_coded(file, weight, precision)
        else:
            container.write_blocks(file, (quantise.to_bf16(weight[begin:end]) for begin, end in _blocks(weight.shape)))
    except EbbflowError as error:
        if error.reason is Reason.WEIGHTS_INVALID:
            raise EbbflowError(Reason.WEIGHTS_INVALID, f"{name}: {error}", tensor=name) from error
        raise


def _write_coded(file: BinaryIO, weight_OI: Float32, precision: Precision) -> None:
    """Writes all codes, then all scales, which are small enough to be kept meanwhile."""
    scales: list[Array] = []
    for begin, end in _blocks(weight_OI.shape):
        codes_OI, scales_OG = quantise.quantise_int8(weight_OI[begin:end])
        stored: Array = codes_OI
        if precision == "int4":
            codes_OI, scales_OG = quantise.derive_int4(codes_OI, scales_OG)
            stored = quantise.pack_nibbles(codes_OI)
        container.write_blocks(file, [stored])
        scales.append(scales_OG)
    container.write_blocks(file, scales)


def _checked_bf16(bits: Any, name: str) -> Float32:
    if not quantise.are_finite_bf16(bits):
        raise _corrupt(name)
    return quantise.from_bf16(cast("quantise.UInt16", bits))
