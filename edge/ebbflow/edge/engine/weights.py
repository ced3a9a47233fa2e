"""The weights of one precision of a release as the kernels want them, in memory of their own.

An artefact is mapped and packed piece by piece; pages of the mapping are let go as soon as they have been read, so that
the resident memory grows by the packed size and little more.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from ebbflow.common.codes import quantise
from ebbflow.common.codes.artefact import Precision, Variant
from ebbflow.common.codes.container import CODES, SCALES, Array, let_go
from ebbflow.common.codes.derive import codes_as
from ebbflow.common.codes.kept import projections
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.library import ALIGNMENT_BYTES, Layer, Matrix, Model

_BITS = {"bf16": 16, "int8": 8, "int4": 4}
_BLOCK_ROWS = 16
_PIECE_WEIGHTS = 1 << 20
_LOW_NIBBLE = 0x0F
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class _Place:
    """One packed matrix: tensors of the artefact, one below the other."""

    names: tuple[str, ...]
    rows: int
    columns: int
    bits: int
    offset_bytes: int


class PackedWeights:
    """All weights of a student, packed.

    Args:
        library: the kernels.
        variant: the artefact that they come from.
        precision: one that the artefact gives.

    Raises:
        EbbflowError: FILE_CORRUPT or WEIGHTS_INVALID if the artefact holds numbers that no code stands for,
            OUT_OF_MEMORY.
    """

    def __init__(self, library: ctypes.CDLL, variant: Variant, precision: Precision) -> None:
        self._library = library
        self.precision: Precision = precision
        self._layout = Layout(library, variant, precision)
        self.bytes = self._layout.size_bytes
        self._memory = anonymous(self.bytes)
        self._address = address_of(self._memory)
        try:
            self.fill(variant)
        except BaseException:
            self.close()
            raise
        config = variant.config
        self._layers = (Layer * config.num_hidden_layers)(*map(self._layer, range(config.num_hidden_layers)))
        embedding = self._matrix((_EMBEDDING,))
        head = embedding if config.tie_word_embeddings else self._matrix((_HEAD,))
        self._ends = embedding, head, self._vector((_NORM,))

    def fill(self, variant: Variant) -> None:
        """Packs an artefact of the same shape into the same memory, tensor by tensor.

        Raises:
            EbbflowError: FILE_CORRUPT or WEIGHTS_INVALID; what was there is lost in part.
        """
        for place in self._layout.matrices.values():
            at = self._address + place.offset_bytes
            for row, pieces in _rows_of(self._library, variant, place, self.precision):
                count = len(pieces[0])
                pointers = [piece.ctypes.data for piece in pieces]
                getattr(self._library, f"ebb_pack{place.bits}")(*pointers, row, count, place.columns, at)
        for names, offset_bytes in self._layout.vectors.items():
            vector = np.concatenate([variant.weight(name) for name in names])
            ctypes.memmove(self._address + offset_bytes, vector.ctypes.data, vector.nbytes)

    def apply(self, model: Model, layers: ctypes.Array[Layer]) -> None:
        """Lets a model compute with these weights from its next step on; takes microseconds."""
        ctypes.memmove(layers, self._layers, ctypes.sizeof(layers))
        model.embedding, model.head, model.norm_out = self._ends

    def close(self) -> None:
        """Gives the memory back. No model may compute with these weights any more."""
        if self.bytes and hasattr(mmap, "MADV_DONTNEED"):
            # Most of the work of unmapping, done by a call that lets other threads of Python go on meanwhile.
            _process().madvise(self._address, len(self._memory), mmap.MADV_DONTNEED)
        self._memory.close()
        self.bytes = 0

    def _layer(self, index: int) -> Layer:
        prefix = f"model.layers.{index}."
        norms = (f"{prefix}{norm}_layernorm.weight" for norm in ("input", "post_attention"))
        return Layer(*map(self._matrix, projections(index)), *(self._vector((name,)) for name in norms))

    def _matrix(self, names: tuple[str, ...]) -> Matrix:
        place = self._layout.matrices[names]
        biases = tuple(name.removesuffix("weight") + "bias" for name in names)
        bias = self._vector(biases) if biases in self._layout.vectors else None
        return Matrix(place.rows, place.columns, place.bits, 0, self._address + place.offset_bytes, bias)

    def _vector(self, names: tuple[str, ...]) -> int:
        return self._address + self._layout.vectors[names]


class Layout:
    """Where everything lies in packed weights.

    Args:
        library: the kernels.
        variant: an artefact of the release.
        precision: one that the artefact gives.
    """

    def __init__(self, library: ctypes.CDLL, variant: Variant, precision: Precision) -> None:
        config = variant.config
        self._library, self._precision, self._shapes = library, precision, config.tensor_shapes()
        self._coded = variant.coded_in(precision)
        self.size_bytes = 0
        self.matrices: dict[tuple[str, ...], _Place] = {}
        self.vectors: dict[tuple[str, ...], int] = {}
        """Byte offsets of float32 vectors, by the names of the tensors that follow one another in them."""
        self._add_matrix((_EMBEDDING,))
        if not config.tie_word_embeddings:
            self._add_matrix((_HEAD,))
        for index in range(config.num_hidden_layers):
            for names in projections(index):
                self._add_matrix(names)
                if config.use_bias:
                    self._add_vector(tuple(name.removesuffix("weight") + "bias" for name in names))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self._add_vector((f"model.layers.{index}.{norm}.weight",))
        self._add_vector((_NORM,))

    def _add_matrix(self, names: tuple[str, ...]) -> None:
        shapes = [self._shapes[name] for name in names]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        bits = _BITS[self._precision if names[0] in self._coded else "bf16"]
        offset_bytes = self._add(self._library.ebb_packed_bytes(bits, rows, columns))
        self.matrices[names] = _Place(names, rows, columns, bits, offset_bytes)

    def _add_vector(self, names: tuple[str, ...]) -> None:
        self.vectors[names] = self._add(sum(self._shapes[name][0] for name in names) * np.float32().itemsize)

    def _add(self, size_bytes: int) -> int:
        offset_bytes = self.size_bytes
        self.size_bytes += size_bytes + -size_bytes % ALIGNMENT_BYTES
        return offset_bytes


def check_numbers(library: ctypes.CDLL, variant: Variant, precision: Precision) -> None:
    """Reads everything that packing would read, and packs nothing.

    Raises:
        EbbflowError: FILE_CORRUPT or WEIGHTS_INVALID if the artefact holds numbers that no code stands for.
    """
    layout = Layout(library, variant, precision)
    for place in layout.matrices.values():
        for _ in _rows_of(library, variant, place, precision):
            pass
    for names in layout.vectors:
        for name in names:
            variant.weight(name)


def anonymous(size_bytes: int) -> mmap.mmap:
    """Maps zeros that are this process' own, in huge pages where the system has them.

    Raises:
        EbbflowError: OUT_OF_MEMORY.
    """
    try:
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise EbbflowError(Reason.OUT_OF_MEMORY, f"the machine has no {size_bytes} bytes left") from error
    if size_bytes >= _PIECE_WEIGHTS and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@cache
def _process() -> ctypes.CDLL:
    """Returns the C library of this process."""
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def address_of(memory: mmap.mmap) -> int:
    """Returns where memory lies; it stays there until it is closed."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _rows_of(
    library: ctypes.CDLL, variant: Variant, place: _Place, precision: Precision
) -> Iterator[tuple[int, list[Array]]]:
    """Yields first row and content of pieces of a matrix: what the packing functions of its bits take.

    Pieces begin at multiples of 16 rows, wherever one tensor ends and the next begins.
    """
    step = max(1, _PIECE_WEIGHTS // (place.columns * _BLOCK_ROWS)) * _BLOCK_ROWS
    shapes = variant.config.tensor_shapes()
    for begin in range(0, place.rows, step):
        parts: list[list[Array]] = []
        first = 0
        for name in place.names:
            rows = shapes[name][0]
            low, high = max(begin - first, 0), min(begin + step - first, rows)
            if low < high:
                parts.append(_read(library, variant, name, slice(low, high), place.bits))
            first += rows
        yield begin, [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _read(library: ctypes.CDLL, variant: Variant, name: str, rows: slice, bits: int) -> list[Array]:
    """Reads rows of one tensor, checked: codes and scales, or bfloat16."""
    keys = (name + CODES, name + SCALES) if variant.is_coded(name) else (name,)
    sources = [variant.tensors[key][rows] for key in keys]
    if bits == _BITS["bf16"]:
        found: list[Array] = [_checked_bf16(sources[0], name)]
    elif variant.precision == "bf16" and (coded := code(library, sources[0], bits)):
        found = coded
    elif variant.precision == "int4":
        found = [_checked_nibbles(sources[0], name), _checked_scales(sources[1], name)]
    else:
        codes_OI, scales_OG = codes_as(variant, name, rows.start, rows.stop, "int8")
        found = [codes_OI, scales_OG]
        if bits == _BITS["int4"]:
            found = list(quantise.derive_nibbles(codes_OI, scales_OG))
    copies = [np.array(array) for array in found]
    for source in sources:
        let_go(source)
    return copies


def code(library: ctypes.CDLL, weights_OI: Array, bits: int) -> list[Array] | None:
    """Returns new codes and scales of bfloat16 weights, as `quantise_int8` and, for 4 bits, `derive_nibbles` make them.

    None if a weight is too large or not finite, which those say in words. In C it takes a tenth of the time.
    """
    rows, inputs = weights_OI.shape
    weights_OI = np.ascontiguousarray(weights_OI)
    codes = np.empty((rows, inputs), np.int8) if bits == _BITS["int8"] else np.empty((rows, inputs // 2), np.uint8)
    scales_OG = np.empty((rows, inputs // quantise.GROUP), np.float16)
    function = getattr(library, f"ebb_code{bits}")
    failed = function(weights_OI.ctypes.data, scales_OG.size, codes.ctypes.data, scales_OG.ctypes.data)
    return None if failed else [codes, scales_OG]


def _checked_bf16(bits: Array, name: str) -> Array:
    if not quantise.are_finite_bf16(bits):
        raise _corrupt(name)
    return bits


def _checked_nibbles(packed: Array, name: str) -> Array:
    """A nibble of 0 would be code -8, which is not one of ours."""
    if int(packed.min()) <= _LOW_NIBBLE or int((packed & np.uint8(_LOW_NIBBLE)).min()) == 0:
        raise _corrupt(name)
    return packed


def _checked_scales(scales_OG: Array, name: str) -> Array:
    if not np.isfinite(scales_OG).all() or np.signbit(scales_OG).any():
        raise _corrupt(name)
    return scales_OG


def _corrupt(name: str) -> EbbflowError:
    return EbbflowError(Reason.FILE_CORRUPT, f"{name} holds numbers that no code stands for", tensor=name)
