"""Makes the INT4 artefact out of the INT8 one, on the device: the same bytes as the release's own INT4 file."""

from pathlib import Path

from ebbflow.common.codes import artefact, container
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
        file.write(artefact.encode_header(variant.config, "int4"))
        for name, shape in variant.config.tensor_shapes().items():
            rows = artefact.blocks(shape)
            if artefact.is_coded(shape, "int4"):
                artefact.write_coded(file, (variant.codes(name, begin, end) for begin, end in rows), "int4")
            else:
                container.write_blocks(file, (variant.tensors[name][begin:end] for begin, end in rows))
