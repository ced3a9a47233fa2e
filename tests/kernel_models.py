"""Small random models for the compiled kernels, and the same models in numpy, to hold the kernels against.

Letters of shapes as in `kernels/ebb.h`: C hidden width, F feed-forward width, H query heads, K key heads, D width of a
head, V vocabulary, T tokens of a sequence.
"""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ebbflow.edge.engine.library import ALIGNMENT_BYTES, PAGE_TOKENS, Batch, Layer, Matrix, Model

Float32 = npt.NDArray[np.float32]
GROUP = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    hidden: int = 64
    inner: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocabulary: int = 77
    bias: bool = False


def aligned(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Returns memory that begins where kernels want it."""
    raw = np.empty(size_bytes + ALIGNMENT_BYTES, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[begin : begin + size_bytes]


def round_bf16(x: Float32) -> Float32:
    """Rounds to bfloat16, half to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).reshape(x.shape)


def round_codes(x: Float32, group: int) -> Float32:
    """Rounds to INT8 codes with one float32 scale for each `group` neighbours."""
    groups = np.ascontiguousarray(x, np.float32).reshape(-1, group)
    most = np.abs(groups).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(most > 0, np.float32(127) / most, np.float32(0))
    return np.asarray(np.rint(groups * inverse) * (most / np.float32(127)), np.float32).reshape(x.shape)


class RandomMatrix:
    """A matrix of random weights: packed, and as float32.

    Attributes:
        packed: the bytes that kernels read.
        weight_OI: what they stand for.
        bias_O: added to every product, or None.
        c: the structure that kernels take.
    """

    def __init__(
        self, library: ctypes.CDLL, rng: np.random.Generator, rows: int, columns: int, bits: int, *, bias: bool = False
    ) -> None:
        self.bits = bits
        self.packed = aligned(library.ebb_packed_bytes(bits, rows, columns))
        self.packed[:] = 0xEE
        self.parts = _random_parts(rng, rows, columns, bits)
        self.weight_OI = _weights(self.parts, rows, columns, bits)
        self.bias_O = rng.standard_normal(rows).astype(np.float32) if bias else None
        self.pack(library, self.packed, 0, rows)
        bias_at = None if self.bias_O is None else self.bias_O.ctypes.data
        self.c = Matrix(rows, columns, bits, 0, self.packed.ctypes.data, bias_at)

    def pack(self, library: ctypes.CDLL, out: npt.NDArray[np.uint8], begin: int, end: int) -> None:
        """Packs some rows."""
        parts = [np.ascontiguousarray(part[begin:end]) for part in self.parts]
        pointers = [part.ctypes.data for part in parts]
        columns = self.weight_OI.shape[1]
        getattr(library, f"ebb_pack{self.bits}")(*pointers, begin, end - begin, columns, out.ctypes.data)

    def round_input(self, x: Float32) -> Float32:
        """Rounds activations as the kernels do before they meet this matrix."""
        return round_bf16(x) if self.bits == 16 else round_codes(x, GROUP)

    def reference(self, x: Float32) -> Float32:
        """Multiplies [.., I] with the matrix."""
        product = self.round_input(x).astype(np.float64) @ self.weight_OI.astype(np.float64).T
        return (product + (0 if self.bias_O is None else self.bias_O)).astype(np.float32)

    def multiply(self, library: ctypes.CDLL, x: Float32) -> Float32:
        """Multiplies [M, I] with the matrix in C."""
        x = np.ascontiguousarray(x, np.float32)
        out = np.full((len(x), self.c.rows), np.nan, np.float32)
        assert library.ebb_multiply(ctypes.byref(self.c), x.ctypes.data, len(x), out.ctypes.data) == 0
        return out


def _random_parts(rng: np.random.Generator, rows: int, columns: int, bits: int) -> list[npt.NDArray[Any]]:
    if bits == 16:
        weights = rng.standard_normal((rows, columns)).astype(np.float32) / np.sqrt(columns, dtype=np.float32)
        return [(round_bf16(weights).view(np.uint32) >> 16).astype(np.uint16)]
    most = 7 if bits == 4 else 127
    codes = rng.integers(-most, most + 1, (rows, columns), np.int8)
    scales = (rng.uniform(0.2, 1.5, (rows, columns // GROUP)) / (most * np.sqrt(columns))).astype(np.float16)
    if bits == 8:
        return [codes, scales]
    unsigned = (codes + 8).astype(np.uint8)
    return [unsigned[:, ::2] | unsigned[:, 1::2] << 4, scales]


def _weights(parts: list[npt.NDArray[Any]], rows: int, columns: int, bits: int) -> Float32:
    if bits == 16:
        return (parts[0].astype(np.uint32) << 16).view(np.float32)
    codes = parts[0]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, columns).astype(np.int8) - 8
    scales = np.repeat(parts[1].astype(np.float32), GROUP, axis=1)
    weight_OI: Float32 = codes.astype(np.float32) * scales
    return weight_OI


class KernelModel:
    """A random model whose every matrix has the same bits, or one bits after the other in turn."""

    def __init__(
        self, library: ctypes.CDLL, shape: Shape, bits: int | tuple[int, ...], kv_bits: int, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.library, self.shape, self.kv_bits = library, shape, kv_bits
        turns = itertools.cycle((bits,) if isinstance(bits, int) else bits)
        width, mixed = shape.hidden, shape.heads * shape.head_dim
        sizes = [(mixed + 2 * shape.kv_heads * shape.head_dim, width), (width, mixed)]
        sizes += [(2 * shape.inner, width), (width, shape.inner)]
        self.layers = [
            [RandomMatrix(library, rng, *size, next(turns), bias=shape.bias) for size in sizes]
            for _ in range(shape.layers)
        ]
        self.embedding = RandomMatrix(library, rng, shape.vocabulary, width, next(turns))
        self.norms = rng.uniform(0.5, 1.5, (2 * shape.layers + 1, width)).astype(np.float32)
        exponents = np.arange(0, shape.head_dim, 2) / shape.head_dim
        self.frequency = (100.0**-exponents).astype(np.float32)

    def reference(self, ids: Sequence[int]) -> Float32:
        """Computes the logits behind every token of one sequence, [T, V]."""
        x = self.embedding.weight_OI[list(ids)]
        for index, (qkv, output, gate_up, down) in enumerate(self.layers):
            x = x + output.reference(self._mix(qkv.reference(_norm(x, self.norms[2 * index]))))
            gate, up = np.split(gate_up.reference(_norm(x, self.norms[2 * index + 1])), 2, axis=-1)
            x = x + down.reference((gate / (1 + np.exp(-gate)) * up).astype(np.float32))
        return self.embedding.reference(_norm(x, self.norms[-1]))

    def _mix(self, qkv: Float32) -> Float32:
        shape, tokens = self.shape, len(qkv)
        heads = qkv.reshape(tokens, -1, shape.head_dim)
        q, k, v = np.split(heads, [shape.heads, shape.heads + shape.kv_heads], axis=1)
        q, k, v = self._turn(q), self._keep(self._turn(k)), self._keep(v)
        share = shape.heads // shape.kv_heads
        k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(shape.head_dim)
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.asarray(np.einsum("hts,shd->thd", weights, v), np.float32).reshape(tokens, -1)

    def _turn(self, heads: Float32) -> Float32:
        angles = np.arange(len(heads), dtype=np.float32)[:, None] * self.frequency
        cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
        even, odd = heads[..., ::2], heads[..., 1::2]
        turned = np.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1)
        return turned.reshape(heads.shape).astype(np.float32)

    def _keep(self, heads: Float32) -> Float32:
        return round_bf16(heads) if self.kv_bits == 16 else round_codes(heads, self.shape.head_dim)


def _norm(x: Float32, weight: Float32) -> Float32:
    return np.asarray(x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 1e-5) * weight, np.float32)


class KernelRun:
    """A model that is open in C, with pages for some sequences. A context manager.

    Args:
        model: the weights.
        sequences: most sequences.
        positions: longest sequence.
        threads: most threads of a step.
        seed: of the order in which pages lie.
        rubbish: the byte that fills pages before they are used.
    """

    def __init__(
        self,
        model: KernelModel,
        sequences: int = 1,
        positions: int = 128,
        threads: int = 1,
        seed: int = 0,
        rubbish: int = 0xFF,
    ) -> None:
        self.model, self.library, shape = model, model.library, model.shape
        self.threads, self.lengths = threads, [0] * sequences
        self._layers = (Layer * max(1, shape.layers))()
        for index, parts in enumerate(model.layers):
            norms = (model.norms[2 * index].ctypes.data, model.norms[2 * index + 1].ctypes.data)
            self._layers[index] = Layer(*(part.c for part in parts), *norms)
        sizes = (shape.hidden, shape.inner, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary)
        most = (model.kv_bits, 256, 256, positions, threads)
        pointers = (model.frequency.ctypes.data, self._layers, model.embedding.c, model.embedding.c)
        self._model = Model(*sizes, *most, 1e-5, 0, *pointers, model.norms[-1].ctypes.data)
        self._pages_each = -(-positions // PAGE_TOKENS)
        count = sequences * self._pages_each
        page_bytes = self.library.ebb_page_bytes(ctypes.byref(self._model))
        self.pages = [aligned(page_bytes) for _ in range(count)]
        for page in self.pages:
            page[:] = rubbish
        self._page = np.array([page.ctypes.data for page in self.pages], np.uint64)
        order = np.random.default_rng(seed).permutation(count).astype(np.int32)
        self._table = np.ascontiguousarray(order.reshape(sequences, self._pages_each))
        self._engine = self.library.ebb_open(ctypes.byref(self._model))
        assert self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.library.ebb_close(self._engine)

    def step(self, entries: Sequence[tuple[int, Sequence[int]]], threads: int | None = None) -> list[Float32]:
        """Takes new tokens of sequences; returns the logits behind each of them, [T, V], for every entry."""
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        for sequence, new in entries:
            begin = self.lengths[sequence]
            ids += list(new)
            positions += range(begin, begin + len(new))
            sequences += [sequence] * len(new)
            self.lengths[sequence] += len(new)
        arrays = [np.array(x, np.int32) for x in (ids, positions, sequences, range(len(ids)))]
        logits = np.full((len(ids), self.model.shape.vocabulary), np.nan, np.float32)
        self.hidden = np.full((len(ids), self.model.shape.hidden), np.nan, np.float32)
        pointers = [array.ctypes.data for array in arrays]
        head = (len(ids), len(ids), self._pages_each, threads or self.threads, *pointers[:3])
        tail = (self._table.ctypes.data, self._page.ctypes.data, pointers[3], logits.ctypes.data)
        self.library.ebb_step(self._engine, ctypes.byref(Batch(*head, *tail, self.hidden.ctypes.data)))
        return list(np.split(logits, np.cumsum([len(new) for _, new in entries])[:-1]))
