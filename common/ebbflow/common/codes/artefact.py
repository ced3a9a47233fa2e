"""The artefact of a variant: one safetensors file for bf16, int8 and int4 alike, with the student's configuration.

A coded matrix NAME is kept as NAME.codes (int8 [O, I], or uint8 [O, I/2] of nibbles) and NAME.scales (float16 [O, G]);
every other tensor as bfloat16 under its own name. In int8 and int4 every matrix is coded whose width allows it, save
those that the file names under "kept_bf16" as sensitive. A bf16 file names them too, for what derives from it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import numpy as np

from ebbflow.common.codes import container, quantise
from ebbflow.common.codes.container import CODES, SCALES, Array, Entry
from ebbflow.common.codes.kept import check_kept, coded_matrices, decode_kept, encode_kept
from ebbflow.common.codes.quantise import Float32
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import atomic
from ebbflow.common.student.config import StudentConfig

Precision = Literal["bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
KVKind = Literal["bf16", "int8"]
"""How engines keep keys and values: as bfloat16, or as INT8 codes with one scale for each head's vector."""
FORMAT = "ebbflow.artefact/1"
_KEPT = "kept_bf16"

# Rows are worked on in blocks of about this many weights, so that memory does not grow with the model.
_BLOCK_WEIGHTS = 1 << 21


@dataclass(frozen=True)
class Variant:
    """What an artefact holds, mapped into memory and not yet de-quantised.

    Attributes:
        tensors: read-only arrays by their names in the file; bfloat16 as uint16.
        config: shape of the student.
        precision: of the coded matrices.
        kept_bf16: matrices that are bfloat16 in every precision of the release, sorted.
    """

    tensors: dict[str, Array]
    config: StudentConfig
    precision: Precision
    kept_bf16: tuple[str, ...] = ()

    def is_coded(self, name: str) -> bool:
        """Says whether a tensor is kept as codes, by its Hugging Face name."""
        return name not in self.tensors

    def coded_in(self, precision: Precision) -> frozenset[str]:
        """Returns the matrices that are codes in any precision of the release, by their Hugging Face names."""
        return _coded(self.config, precision, self.kept_bf16)

    def weight(self, name: str) -> Float32:
        """De-quantises one tensor, by its Hugging Face name.

        Raises:
            EbbflowError: FILE_CORRUPT if it holds numbers that no code stands for.
        """
        shape = self.config.tensor_shapes()[name]
        if not self.is_coded(name):
            return _checked_bf16(self.tensors[name], name)
        weight_OI = np.empty(shape, np.float32)
        for begin, end in blocks(shape):
            codes_OI, scales_OG = self.codes(name, begin, end)
            weight_OI[begin:end] = quantise.dequantise(codes_OI, scales_OG)
        return weight_OI

    def scales(self, name: str) -> quantise.Float16:
        """Returns the scales [O, G] of one coded matrix, by its Hugging Face name.

        Raises:
            EbbflowError: FILE_CORRUPT if one is negative or not finite.
        """
        scales_OG = cast("quantise.Float16", self.tensors[name + SCALES])
        if not _are_scales(scales_OG):
            raise _corrupt(name)
        return scales_OG

    def codes(self, name: str, begin: int, end: int) -> tuple[quantise.Int8, quantise.Float16]:
        """Returns unpacked codes [O, I] and scales [O, G] of some rows of one coded matrix.

        Raises:
            EbbflowError: FILE_CORRUPT if it holds numbers that no code stands for.
        """
        codes_OI, scales_OG = self.tensors[name + CODES][begin:end], self.tensors[name + SCALES][begin:end]
        most = quantise.INT8_MOST
        if self.precision == "int4":
            codes_OI, most = quantise.unpack_nibbles(codes_OI), quantise.INT4_MOST
        if not _are_scales(scales_OG) or int(codes_OI.min()) < -most or int(codes_OI.max()) > most:
            raise _corrupt(name)
        return codes_OI, scales_OG


def write_variant(
    path: Path,
    tensors: Mapping[str, Float32],
    config: StudentConfig,
    precision: Precision,
    kept: Variant | None = None,
    kept_bf16: Sequence[str] = (),
) -> None:
    """Writes the artefact of one precision, atomically; the same weights and kept scales give the same bytes.

    Holds one block of rows beside what `tensors` holds, so a mapping that loads on demand keeps memory flat.

    Args:
        path: the file; replaced if it exists.
        tensors: float32 weights by Hugging Face name: all of `config.tensor_shapes()` and no other.
        config: shape of the student.
        precision: "int4" derives its codes from the INT8 codes.
        kept: INT8 variant of an earlier release whose tensors have the same shapes: its scales are kept where they
            still reach.
        kept_bf16: matrices that no precision codes, as `choose_kept` returns them.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a weight is missing, misshapen, not finite or too large; FILE_CORRUPT if
            `kept` is of another precision or shape, or holds numbers that no scale can be; INVALID_REQUEST if
            `kept_bf16` names what cannot be kept; DISK_FULL.
    """
    try:
        check_kept(kept_bf16, config)
    except ValueError as error:
        message = "what is kept in bf16 must be sorted names of matrices that could be coded, in whole groups"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="kept_bf16") from error
    if kept is not None and (kept.precision != "int8" or kept.config.tensor_shapes() != config.tensor_shapes()):
        raise EbbflowError(Reason.FILE_CORRUPT, "scales can only be kept from an int8 artefact of the same shapes")
    shapes = config.tensor_shapes()
    for name in sorted(shapes.keys() ^ tensors.keys()):
        raise EbbflowError(Reason.WEIGHTS_INVALID, f"tensor {name!r} is {'missing' if name in shapes else 'not known'}")
    coded = _coded(config, precision, kept_bf16)
    with atomic(path, mode=0o644) as file:
        file.write(encode_header(config, precision, kept_bf16))
        for name, shape in shapes.items():
            weight = np.asarray(tensors[name], np.float32)
            if weight.shape != shape:
                raise EbbflowError(Reason.WEIGHTS_INVALID, f"{name!r} has shape {weight.shape}, not {shape}")
            with _named(name):
                if name in coded:
                    scales_OG = kept.scales(name) if kept and kept.is_coded(name) else None
                    _write_codes(file, weight, precision, scales_OG)
                else:
                    _write_bf16(file, weight)


def encode_header(config: StudentConfig, precision: Precision, kept_bf16: Sequence[str] = ()) -> bytes:
    """Returns the beginning of an artefact, up to its first tensor."""
    metadata = {
        "format": FORMAT,
        "precision": precision,
        "config": json.dumps(config.to_hf(), sort_keys=True, separators=(",", ":")),
    }
    if kept_bf16:
        metadata[_KEPT] = encode_kept(kept_bf16)
    return container.encode_header(_stored(config, precision, kept_bf16), metadata)


def size_bytes(config: StudentConfig, precision: Precision, kept_bf16: Sequence[str] = ()) -> int:
    """Returns the bytes that the tensors of an artefact take."""
    return sum(entry.size_bytes for entry in _stored(config, precision, kept_bf16).values())


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
        kept_bf16 = decode_kept(metadata[_KEPT], config) if _KEPT in metadata else ()
    except (KeyError, ValueError, RecursionError, EbbflowError) as error:
        raise _corrupt(path.name) from error
    variant = Variant(tensors, config, precision, kept_bf16)
    found = {name: Entry(_dtype_name(array), array.shape) for name, array in tensors.items()}
    if found != _stored(config, variant.precision, kept_bf16):
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


def _coded(config: StudentConfig, precision: Precision, kept_bf16: Sequence[str]) -> frozenset[str]:
    return frozenset() if precision == "bf16" else coded_matrices(config, kept_bf16)


def _stored(config: StudentConfig, precision: Precision, kept_bf16: Sequence[str]) -> dict[str, Entry]:
    """Tensors of the file, in its order."""
    coded = _coded(config, precision, kept_bf16)
    entries: dict[str, Entry] = {}
    for name, shape in config.tensor_shapes().items():
        if name in coded:
            rows, inputs = shape
            codes = Entry("I8", shape) if precision == "int8" else Entry("U8", (rows, inputs // 2))
            entries[name + CODES] = codes
            entries[name + SCALES] = Entry("F16", (rows, inputs // quantise.GROUP))
        else:
            entries[name] = Entry("BF16", shape)
    return entries


def _are_scales(scales_OG: Array) -> bool:
    return bool(np.isfinite(scales_OG).all()) and not bool(np.signbit(scales_OG).any())


def _dtype_name(array: Array) -> str:
    return {"u2": "BF16", "f2": "F16", "i1": "I8", "u1": "U8"}[array.dtype.str[1:]]


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows from and to, block by block."""
    step = max(1, _BLOCK_WEIGHTS // max(1, int(np.prod(shape[1:]))))
    return ((begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Says which tensor holds a number that cannot be written."""
    try:
        yield
    except EbbflowError as error:
        if error.reason is Reason.WEIGHTS_INVALID:
            raise EbbflowError(Reason.WEIGHTS_INVALID, f"{name}: {error}", tensor=name) from error
        raise


def _write_codes(file: BinaryIO, weight: Float32, precision: Precision, kept_OG: quantise.Float16 | None) -> None:
    quantised = (
        quantise.quantise_int8(weight[begin:end], None if kept_OG is None else kept_OG[begin:end])
        for begin, end in blocks(weight.shape)
    )
    write_coded(file, quantised, precision)


def _write_bf16(file: BinaryIO, weight: Float32) -> None:
    container.write_blocks(file, (quantise.to_bf16(weight[begin:end]) for begin, end in blocks(weight.shape)))


def write_coded(
    file: BinaryIO, quantised: Iterable[tuple[quantise.Int8, quantise.Float16]], precision: Precision
) -> None:
    """Writes a matrix of INT8 codes, or the INT4 ones that they give, block by block of rows.

    All codes go first, then all scales, which are small enough to be kept meanwhile.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a scale is too large for INT4.
    """
    scales: list[Array] = []
    for codes8_OI, scales8_OG in quantised:
        if precision == "int4":
            codes_OI, scales_OG = quantise.derive_int4(codes8_OI, scales8_OG)
            container.write_blocks(file, [quantise.pack_nibbles(codes_OI)])
            scales.append(scales_OG)
        else:
            container.write_blocks(file, [codes8_OI])
            scales.append(scales8_OG)
    container.write_blocks(file, scales)


def _checked_bf16(bits: Any, name: str) -> Float32:
    if not quantise.are_finite_bf16(bits):
        raise _corrupt(name)
    return quantise.from_bf16(cast("quantise.UInt16", bits))
