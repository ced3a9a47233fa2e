"""Other precisions out of one artefact, on the device.

INT4 out of INT8 has the codes of the release's own INT4 file. INT8 and INT4 out of bf16 have new scales, which the
release's own files may have kept from the release before, so their codes may differ by a step.
"""

from pathlib import Path

import numpy as np

from ebbflow.common.codes import artefact, container, quantise
from ebbflow.common.codes.artefact import PRECISIONS, Precision, Variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import atomic


def derive_int4(int8_path: Path, out: Path) -> None:
    """Writes the INT4 artefact that `write_variant` makes of the same weights, atomically.

    Memory: one block of rows and one matrix' scales, whatever the model's size.

    Args:
        int8_path: an INT8 artefact.
        out: the file; replaced if it exists.

    Raises:
        EbbflowError: FILE_CORRUPT if the INT8 artefact is not whole or of another precision; DISK_FULL.
    """
    variant = artefact.read_variant(int8_path)
    if variant.precision != "int8":
        raise EbbflowError(Reason.FILE_CORRUPT, f"{int8_path} holds {variant.precision}; INT4 derives from int8")
    with atomic(out, mode=0o644) as file:
        file.write(artefact.encode_header(variant.config, "int4", variant.kept_bf16))
        for name, shape in variant.config.tensor_shapes().items():
            rows = artefact.blocks(shape)
            if variant.is_coded(name):
                artefact.write_coded(file, (variant.codes(name, begin, end) for begin, end in rows), "int4")
            else:
                container.write_blocks(file, (variant.tensors[name][begin:end] for begin, end in rows))


def offered_by(precision: Precision) -> tuple[Precision, ...]:
    """Returns the precisions that an artefact gives, best first: its own and every smaller one."""
    return PRECISIONS[PRECISIONS.index(precision) :]


def codes_as(
    variant: Variant, name: str, begin: int, end: int, precision: Precision
) -> tuple[quantise.Int8, quantise.Float16]:
    """Returns codes [O, I], one per int8, and scales [O, G] of some rows of a matrix in a precision that is offered.

    Args:
        variant: an artefact.
        name: of a matrix that is coded in `precision`, by its Hugging Face name.
        begin: first row.
        end: behind the last row.
        precision: "int8" or "int4".

    Raises:
        EbbflowError: FILE_CORRUPT if the artefact holds numbers that no code stands for;
            WEIGHTS_INVALID if a weight or a scale is too large to be coded.
    """
    if variant.precision == "bf16":
        bits_OI = variant.tensors[name][begin:end]
        if not quantise.are_finite_bf16(bits_OI):
            raise EbbflowError(Reason.FILE_CORRUPT, f"{name} holds numbers that are not finite")
        codes_OI, scales_OG = quantise.quantise_int8(quantise.from_bf16(bits_OI))
    else:
        codes_OI, scales_OG = variant.codes(name, begin, end)
    if precision == "int8" or variant.precision == "int4":
        return codes_OI, scales_OG
    return quantise.derive_int4(codes_OI, scales_OG)


def weight_as(variant: Variant, name: str, precision: Precision) -> quantise.Float32:
    """De-quantises one tensor, by its Hugging Face name, in a precision that is offered.

    Raises:
        EbbflowError: as `codes_as` does.
    """
    shape = variant.config.tensor_shapes()[name]
    if variant.precision == precision or name not in variant.coded_in(precision):
        return variant.weight(name)
    weight_OI = np.empty(shape, np.float32)
    for begin, end in artefact.blocks(shape):
        weight_OI[begin:end] = quantise.dequantise(*codes_as(variant, name, begin, end, precision))
    return weight_OI
