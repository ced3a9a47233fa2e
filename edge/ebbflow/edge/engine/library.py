"""The compiled kernels, through their C interface (`kernels/ebb.h`): structures, signatures, and finding the library.

Every size is checked in Python before it gets there; C trusts what it is given.
"""

import ctypes
from functools import cache
from pathlib import Path

ABI = 1
PAGE_TOKENS = 32
"""Tokens of one page of the KV cache."""
ALIGNMENT_BYTES = 64

_int = ctypes.c_int32
_pointer = ctypes.c_void_p
_size = ctypes.c_size_t


class Matrix(ctypes.Structure):
    """`ebb_matrix`."""

    _fields_ = (
        ("rows", _int),
        ("columns", _int),
        ("bits", _int),
        ("reserved", _int),
        ("data", _pointer),
        ("bias", _pointer),
    )


class Layer(ctypes.Structure):
    """`ebb_layer`."""

    _fields_ = (
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("norm_in", _pointer),
        ("norm_mid", _pointer),
    )


class Model(ctypes.Structure):
    """`ebb_model`."""

    _fields_ = (
        ("hidden", _int),
        ("inner", _int),
        ("layers", _int),
        ("heads", _int),
        ("kv_heads", _int),
        ("head_dim", _int),
        ("vocabulary", _int),
        ("kv_bits", _int),
        ("max_tokens", _int),
        ("max_outputs", _int),
        ("max_positions", _int),
        ("threads", _int),
        ("epsilon", ctypes.c_float),
        ("reserved", _int),
        ("frequency", _pointer),
        ("layer", ctypes.POINTER(Layer)),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm_out", _pointer),
    )


class Batch(ctypes.Structure):
    """`ebb_batch`."""

    _fields_ = (
        ("tokens", _int),
        ("outputs", _int),
        ("pages_per_sequence", _int),
        ("threads", _int),
        ("id", _pointer),
        ("position", _pointer),
        ("sequence", _pointer),
        ("page_table", _pointer),
        ("page", _pointer),
        ("output", _pointer),
        ("logits", _pointer),
        ("last_hidden", _pointer),
    )


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ebb_abi": (ctypes.c_int, ()),
    "ebb_isa": (ctypes.c_char_p, ()),
    "ebb_use_isa": (ctypes.c_int, (ctypes.c_char_p,)),
    "ebb_packed_bytes": (_size, (_int, _int, _int)),
    "ebb_page_bytes": (_size, (ctypes.POINTER(Model),)),
    "ebb_pack4": (None, (_pointer, _pointer, _int, _int, _int, _pointer)),
    "ebb_pack8": (None, (_pointer, _pointer, _int, _int, _int, _pointer)),
    "ebb_pack16": (None, (_pointer, _int, _int, _int, _pointer)),
    "ebb_code4": (ctypes.c_int, (_pointer, _size, _pointer, _pointer)),
    "ebb_code8": (ctypes.c_int, (_pointer, _size, _pointer, _pointer)),
    "ebb_multiply": (ctypes.c_int, (ctypes.POINTER(Matrix), _pointer, _int, _pointer)),
    "ebb_open": (_pointer, (ctypes.POINTER(Model),)),
    "ebb_step": (None, (_pointer, ctypes.POINTER(Batch))),
    "ebb_close": (None, (_pointer,)),
}


LIBRARY = Path(__file__).with_name("kernels") / "libebb.so"
"""Made by `hatch_build.py` from the C sources beside it; the name is the same on every system."""


def open_library(path: Path) -> ctypes.CDLL:
    """Loads a library of kernels and declares its functions.

    Raises:
        OSError: there is none, or it is for another machine.
        AttributeError: it is another library.
        ValueError: it is of another version.
    """
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
    if (found := library.ebb_abi()) != ABI:
        raise ValueError(f"{path} has version {found} of the kernels' interface where {ABI} is needed")
    return library


@cache
def find_library() -> ctypes.CDLL | None:
    """Returns the compiled kernels, or None where they were not compiled or do not fit this version."""
    try:
        return open_library(LIBRARY)
    except (OSError, AttributeError, ValueError):
        return None
