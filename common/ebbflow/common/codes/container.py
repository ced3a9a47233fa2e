"""The safetensors container, read by memory map and written tensor by tensor, with numpy alone.

Source: the format's description at https://github.com/huggingface/safetensors: eight bytes of header length, a JSON
header, then the tensors without gaps. bfloat16, which numpy lacks, is uint16 here.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason

Array = npt.NDArray[Any]

HEADER_MOST_BYTES = 16 << 20
_ALIGNMENT_BYTES = 64
_LENGTH_BYTES = 8
_MOST_DIMENSIONS = 8
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True)
class Entry:
    """Type and shape of a tensor."""

    dtype: str
    """One of "BF16", "F16", "I8" and "U8"."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Returns length and header of a file that holds the tensors in the order of `entries`."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.size_bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def write_blocks(file: BinaryIO, blocks: Iterable[Array]) -> None:
    """Writes arrays one behind the other."""
    file.writelines(np.ascontiguousarray(block).data for block in blocks)


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Maps a file into memory: read-only arrays by name, and the metadata.

    Nothing of the file is trusted before it is checked; the numbers themselves are not.

    Raises:
        EbbflowError: FILE_CORRUPT if it is missing, cut short or malformed.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            begin = _LENGTH_BYTES + length
            if length > HEADER_MOST_BYTES or begin > size_bytes:
                raise _corrupt(path)
            header = json.loads(file.read(length).decode())
            entries, metadata = _parse(header, size_bytes - begin)
        data = np.memmap(path, np.uint8, mode="r") if size_bytes > begin else np.zeros(0, np.uint8)
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(path) from error
    arrays: dict[str, Array] = {}
    for name, entry in entries.items():
        piece = np.asarray(data)[begin : begin + entry.size_bytes]
        arrays[name] = piece.view(_DTYPES[entry.dtype]).reshape(entry.shape)
        begin += entry.size_bytes
    return arrays, metadata


def _corrupt(path: Path) -> EbbflowError:
    return EbbflowError(Reason.FILE_CORRUPT, f"{path} is not a whole safetensors file", path=path)


def _parse(header: Any, data_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns tensors in the order of their bytes, and metadata; ValueError if the header is malformed."""
    if not isinstance(header, dict):
        raise ValueError("header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata")
    placed = sorted(((*_place(fields), name) for name, fields in header.items()), key=lambda item: (item[0], item[1]))
    entries: dict[str, Entry] = {}
    offset = 0
    for begin, end, entry, name in placed:
        if begin != offset or end - begin != entry.size_bytes:
            raise ValueError(name)
        entries[name] = entry
        offset = end
    if offset != data_bytes:
        raise ValueError("size")
    return entries, metadata


def _place(fields: Any) -> tuple[int, int, Entry]:
    """Reads one tensor's bytes from and to, type and shape."""
    if not isinstance(fields, dict):
        raise ValueError("tensor")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or not isinstance(dtype, str):
        raise ValueError("tensor")
    whole = all(type(number) is int and number >= 0 for number in (*shape, *offsets))
    if dtype not in _DTYPES or not whole or len(shape) > _MOST_DIMENSIONS:
        raise ValueError("tensor")
    begin, end = offsets
    return begin, end, Entry(dtype, tuple(shape))
