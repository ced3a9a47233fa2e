"""One opened engine of the kernels: its model, its buffers, and the call that takes a step.

Letters of shapes: N tokens of a step, P pieces of it, V vocabulary, C width of the residual stream.
"""

import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ebbflow.common.codes.artefact import KVKind
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.edge.engine.base import Logits
from ebbflow.edge.engine.library import Batch, Layer, Model
from ebbflow.edge.engine.weights import PackedWeights

Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

MOST_TOKENS = 128
"""New tokens of one call; a longer step is several calls, whose weights are read once each."""
_KV_BITS = {"bf16": 16, "int8": 8}


@dataclass(frozen=True)
class Rows:
    """The tokens of a step, in one row; positions of a sequence ascend.

    Attributes:
        ids: [N] below the vocabulary's size.
        positions: [N] of each token in its sequence.
        sequences: [N] row of the page table of each token's sequence.
        outputs: which of the N are wanted, ascending.
    """

    ids: Int32
    positions: Int32
    sequences: Int32
    outputs: Int32


class Session:
    """Computes forward steps; one thread at a time.

    Args:
        library: the kernels.
        config: shape of the student.
        context_tokens: longest sequence.
        kv_cache: how keys and values are kept.
        threads: most threads that can be asked to compute; they sleep between steps.

    Raises:
        EbbflowError: OUT_OF_MEMORY if there is no memory for the buffers, or no thread.
    """

    def __init__(
        self, library: ctypes.CDLL, config: StudentConfig, context_tokens: int, kv_cache: KVKind, threads: int
    ) -> None:
        self._library, self._config = library, config
        self._frequency = frequencies(config)
        self._layers = (Layer * config.num_hidden_layers)()
        self._model = Model(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocabulary=config.vocab_size,
            kv_bits=_KV_BITS[kv_cache],
            max_tokens=MOST_TOKENS,
            max_outputs=MOST_TOKENS,
            max_positions=context_tokens,
            threads=threads,
            epsilon=config.rms_norm_eps,
            frequency=self._frequency.ctypes.data,
            layer=self._layers,
        )
        self.page_bytes: int = library.ebb_page_bytes(self._model)
        self.instruction_set: str = library.ebb_isa().decode()
        self._ids, self._positions, self._sequences, self._outputs = np.zeros((4, MOST_TOKENS), np.int32)
        self._batch = Batch(
            threads=threads,
            id=self._ids.ctypes.data,
            position=self._positions.ctypes.data,
            sequence=self._sequences.ctypes.data,
            output=self._outputs.ctypes.data,
        )
        self._table: Int32 | None = None
        self._addresses: UInt64 | None = None
        handle = library.ebb_open(self._model)
        if not handle:
            raise EbbflowError(Reason.OUT_OF_MEMORY, f"there is no memory for the buffers of {threads} threads")
        self._handle = ctypes.c_void_p(handle)
        # The model must outlive the engine in C, so the finalizer holds it too.
        kept = (self._model, self._layers, self._frequency)
        self._end = weakref.finalize(self, _close, library, self._handle, kept)

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return int(self._batch.threads)

    @threads.setter
    def threads(self, count: int) -> None:
        self._batch.threads = count

    def use(self, weights: PackedWeights) -> None:
        """Computes with these weights from the next step on; whoever owns them must keep them until then."""
        weights.apply(self._model, self._layers)

    def logits(self, rows: Rows, table: Int32, addresses: UInt64) -> Logits:
        """Takes a step; returns float32 logits of the wanted tokens, [outputs, V].

        Args:
            rows: the tokens.
            table: pages of each sequence by 32 tokens, C-contiguous.
            addresses: memory of each page that the table names.
        """
        logits_NV = np.empty((len(rows.outputs), self._config.vocab_size), np.float32)
        for first in self._pieces(rows, table, addresses):
            self._batch.logits, self._batch.last_hidden = logits_NV.ctypes.data + first * logits_NV.strides[0], None
            self._library.ebb_step(self._handle, self._batch)
        return logits_NV

    def hidden(self, rows: Rows, table: Int32, addresses: UInt64) -> npt.NDArray[np.float32]:
        """Takes a step; returns last hidden states of the wanted tokens, [outputs, C]; arguments as of `logits`."""
        hidden_NC = np.empty((len(rows.outputs), self._config.hidden_size), np.float32)
        for first in self._pieces(rows, table, addresses):
            self._batch.logits, self._batch.last_hidden = None, hidden_NC.ctypes.data + first * hidden_NC.strides[0]
            self._library.ebb_step(self._handle, self._batch)
        return hidden_NC

    def close(self) -> None:
        """Ends the threads and gives the buffers back."""
        self._end()

    def _pieces(self, rows: Rows, table: Int32, addresses: UInt64) -> Iterator[int]:
        """Sets the batch to each piece of a step that one call takes; yields the number of its first output."""
        self._look_at(table, addresses)
        batch, total = self._batch, len(rows.ids)
        first = 0
        for begin in range(0, total, MOST_TOKENS):
            count = min(MOST_TOKENS, total - begin)
            end = begin + count
            last = len(rows.outputs) if end == total else int(np.searchsorted(rows.outputs, end))
            self._ids[:count] = rows.ids[begin:end]
            self._positions[:count] = rows.positions[begin:end]
            self._sequences[:count] = rows.sequences[begin:end]
            np.subtract(rows.outputs[first:last], begin, out=self._outputs[: last - first])
            batch.tokens, batch.outputs = count, last - first
            yield first
            first = last

    def _look_at(self, table: Int32, addresses: UInt64) -> None:
        """Points the batch to arrays that seldom change place; asking numpy for a pointer takes a microsecond."""
        if table is not self._table:
            self._table, self._batch.page_table = table, table.ctypes.data
            self._batch.pages_per_sequence = table.shape[1]
        if addresses is not self._addresses:
            self._addresses, self._batch.page = addresses, addresses.ctypes.data


def frequencies(config: StudentConfig) -> npt.NDArray[np.float32]:
    """Returns by what angle each pair of a head turns per position, [D/2], as `student.model.rotation` has it."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    return (np.float32(1.0) / np.float32(config.rope_theta) ** exponent).astype(np.float32)


def buffer_bytes(config: StudentConfig, threads: int) -> int:
    """Returns about how much memory a session's own buffers take."""
    widest = max(config.hidden_size, config.intermediate_size, config.query_width)
    projected = 2 * config.query_width + 2 * config.key_width + 2 * config.intermediate_size
    floats = MOST_TOKENS * (config.hidden_size + 2 * widest + projected + config.head_dim)
    return np.float32().itemsize * (floats + threads * 32 * (config.head_dim + 32))


def _close(library: ctypes.CDLL, handle: ctypes.c_void_p, kept: object) -> None:
    del kept
    library.ebb_close(handle)
