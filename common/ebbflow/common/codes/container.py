"""The safetensors container, read by memory map and written tensor by tensor, with numpy alone.

Source: the format's description at https://github.com/huggingface/safetensors: eight bytes of header length, a JSON
header, then the tensors without gaps. bfloat16, which numpy lacks, is uint16 here.
"""

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason

Array = npt.NDArray[Any]

CODES, SCALES = ".codes", ".scales"
"""How the names of the two tensors of a coded matrix end."""
HEADER_MOST_BYTES = 16 << 20
_ALIGNMENT_BYTES = 64
# Whoever reads a page gets its neighbours mapped too, if they are in memory: 64 KiB on Linux.
_FAULT_AROUND_BYTES = 1 << 17
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
        return math.prod(self.shape) * self.item_bytes

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    offset_bytes: int
    """From the beginning of the file."""
    entry: Entry


@dataclass(frozen=True)
class Layout:
    """Where everything is in a file.

    Attributes:
        prefix: the file's beginning: length and header.
        places: tensors by name, in the order of their bytes, without gaps.
        metadata: texts by key.
        size_bytes: length of the file.
    """

    prefix: bytes
    places: dict[str, Place]
    metadata: dict[str, str]
    size_bytes: int


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


def parse_prefix(prefix: bytes, size_bytes: int) -> Layout:
    """Reads length and header of a file of `size_bytes`, trusting nothing of them.

    Raises:
        ValueError: the header is malformed, or does not account for every byte of the file.
        RecursionError: the header is nested too deeply.
    """
    if int.from_bytes(prefix[:_LENGTH_BYTES], "little") != len(prefix) - _LENGTH_BYTES:
        raise ValueError("length")
    entries, metadata = _parse(json.loads(prefix[_LENGTH_BYTES:].decode()), size_bytes - len(prefix))
    places: dict[str, Place] = {}
    offset = len(prefix)
    for name, entry in entries.items():
        places[name] = Place(offset, entry)
        offset += entry.size_bytes
    return Layout(prefix, places, metadata, size_bytes)


def read_layout(path: Path) -> Layout:
    """Reads where everything is in a file, and nothing else of it.

    Raises:
        EbbflowError: FILE_CORRUPT if it is missing, cut short or malformed.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            if length > HEADER_MOST_BYTES or _LENGTH_BYTES + length > size_bytes:
                raise _corrupt(path)
            return parse_prefix(start + file.read(length), size_bytes)
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(path) from error


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Maps a file into memory: read-only arrays by name, and the metadata.

    Nothing of the file is trusted before it is checked; the numbers themselves are not.

    Raises:
        EbbflowError: FILE_CORRUPT if it is missing, cut short or malformed.
    """
    layout = read_layout(path)
    try:
        mapped = layout.size_bytes > len(layout.prefix)
        data = np.memmap(path, np.uint8, mode="r") if mapped else np.zeros(layout.size_bytes, np.uint8)
        if data.size != layout.size_bytes:
            raise _corrupt(path)
    except (OSError, ValueError) as error:
        raise _corrupt(path) from error
    arrays: dict[str, Array] = {}
    for name, place in layout.places.items():
        piece = np.asarray(data)[place.offset_bytes : place.offset_bytes + place.entry.size_bytes]
        arrays[name] = piece.view(_DTYPES[place.entry.dtype]).reshape(place.entry.shape)
    return arrays, layout.metadata


def let_go(array: Array) -> None:
    """Lets go of the memory behind an array that `read` mapped, until it is read again. Harmless for any other."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    end = min(begin + array.nbytes + _FAULT_AROUND_BYTES, len(base))
    begin = max(begin - _FAULT_AROUND_BYTES, 0)
    begin -= begin % mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, begin, end - begin)


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
