"""The entropy coder of deltas in C, if a compiler was there when Ebbflow was installed."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ebbflow.common.codes.rans import (
    Coded,
    Coder,
    Int64,
    NumpyCoder,
    UInt8,
    UInt16,
    invalid,
    lanes_of,
    payload_most_bytes,
)

LIBRARY = Path(__file__).with_name("native") / "rans.so"
"""Made by `hatch_build.py` from the C source beside it; the name is the same on every system."""
_ABI = 1


class CompiledCoder:
    """The coder in C."""

    batch_symbols = 1

    def __init__(self, library: ctypes.CDLL) -> None:
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        self._count = library.ebbflow_rans_count
        self._count.restype, self._count.argtypes = None, [pointer, size, pointer]
        self._encode = library.ebbflow_rans_encode
        self._encode.restype = size
        self._encode.argtypes = [pointer, size, ctypes.c_int32, pointer, pointer, size]
        self._decode = library.ebbflow_rans_decode
        self._decode.restype = ctypes.c_int32
        self._decode.argtypes = [ctypes.c_char_p, size, size, ctypes.c_int32, pointer, pointer]

    def count(self, symbols: UInt8) -> Int64:
        """Counts."""
        counts = np.zeros(256, np.int64)
        symbols = np.ascontiguousarray(symbols)
        self._count(symbols.ctypes.data, symbols.size, counts.ctypes.data)
        return counts

    def encode(self, streams: Sequence[tuple[UInt8, UInt16]]) -> list[bytes]:
        """Codes one stream after the other."""
        return [self._encode_one(np.ascontiguousarray(symbols), shares) for symbols, shares in streams]

    def decode(self, streams: Sequence[Coded]) -> list[UInt8]:
        """Decodes one stream after the other."""
        return [self._decode_one(stream) for stream in streams]

    def _encode_one(self, symbols: UInt8, shares: UInt16) -> bytes:
        payload = np.empty(payload_most_bytes(symbols.size), np.uint8)
        size = self._encode(
            symbols.ctypes.data,
            symbols.size,
            lanes_of(symbols.size),
            np.ascontiguousarray(shares).ctypes.data,
            payload.ctypes.data,
            payload.size,
        )
        if size < 0:
            raise ValueError(f"no rANS payload: {size}")
        return payload[:size].tobytes()

    def _decode_one(self, stream: Coded) -> UInt8:
        symbols = np.empty(stream.length, np.uint8)
        shares = np.ascontiguousarray(stream.frequencies)
        lanes = lanes_of(stream.length)
        failed = self._decode(
            stream.payload, len(stream.payload), stream.length, lanes, shares.ctypes.data, symbols.ctypes.data
        )
        if failed:
            raise invalid("a stream does not come out even")
        return symbols


@cache
def best_coder() -> Coder:
    """Returns the coder in C if there is one that fits this version, else the one in numpy."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.ebbflow_rans_abi() == _ABI:
            return CompiledCoder(library)
    except (OSError, AttributeError):
        pass
    return NumpyCoder()
