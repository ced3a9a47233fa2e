"""The native engine: one call into compiled kernels for each forward step.

A step lays the new tokens of all sequences in one row and hands the kernels arrays of numbers, every one of them
checked here. Keys and values lie in pages (`pages.py`) that sequences with the same beginning share.
"""

import _thread
import ctypes
import heapq
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from ebbflow.common.codes.artefact import KVKind, Precision, Variant, read_variant
from ebbflow.common.codes.derive import offered_by
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.edge.engine.base import (
    EngineMemory,
    Logits,
    Prepared,
    StepEntry,
    check_empty,
    check_entries,
    check_memory,
    check_replacement,
    check_threads,
    check_tokens,
)
from ebbflow.edge.engine.page_memory import PageMemory
from ebbflow.edge.engine.pages import PageBook, Pages, pages_for
from ebbflow.edge.engine.session import Rows, Session, buffer_bytes
from ebbflow.edge.engine.weights import Layout, PackedWeights, check_numbers

MOST_THREADS = 256
PREFIX_CACHE_BYTES = 32 << 20
_WIDEST_HEAD = 1024
_FIRST_SLOTS = 8


def unsupported(config: StudentConfig) -> str:
    """Says why the kernels cannot run a student of this shape; empty if they can."""
    if config.head_dim > _WIDEST_HEAD:
        return f"its heads are {config.head_dim} wide; the kernels take up to {_WIDEST_HEAD}"
    odd = [width for width in (config.hidden_size, config.intermediate_size, config.query_width) if width % 2]
    return f"a width of {odd[0]} is odd; the kernels take pairs" if odd else ""


def available_threads() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeEngine:
    """Runs a student with the compiled kernels; see `Engine`. Collected or shut down, it frees what it holds."""

    name = "native"
    reason = ""
    _table: npt.NDArray[np.int32]

    def __init__(
        self,
        library: ctypes.CDLL,
        weights_path: Path,
        *,
        threads: int | None = None,
        context_tokens: int | None = None,
        memory_limit_bytes: int | None = None,
        kv_cache: KVKind = "bf16",
        precision: Precision | None = None,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> None:
        """Loads an artefact of a shape that is supported.

        Args:
            library: the kernels.
            weights_path: an artefact of any precision.
            threads: threads to compute with; None means as many as there are cores.
            context_tokens: most tokens of a slot; None or more than the student's own means the student's own.
            memory_limit_bytes: most bytes of weights, buffers and KV cache together; None for no limit.
            kv_cache: how keys and values are kept.
            precision: to compute with; None means the artefact's own.
            prefix_cache_bytes: most bytes of keys and values that are kept though no sequence holds them.

        Raises:
            EbbflowError: FILE_CORRUPT if the artefact is not whole; INVALID_REQUEST if it does not give the precision;
                CONFIG_INVALID for a number of threads that cannot be; OUT_OF_MEMORY.
        """
        self._variant = variant = read_variant(weights_path)
        self._library, self.weights_path = library, weights_path
        self.config: StudentConfig = variant.config
        self.precision: Precision = precision or variant.precision
        self._require_offered(variant, self.precision)
        longest = variant.config.max_position_embeddings
        self.context_tokens: int = min(context_tokens or longest, longest)
        if threads is not None:
            check_threads(threads, MOST_THREADS)
        self.max_threads: int = max(available_threads(), threads or 1)
        self._limit_bytes = memory_limit_bytes
        self._fixed_bytes = buffer_bytes(self.config, self.max_threads)
        needed_bytes = self._fixed_bytes + Layout(library, variant, self.precision).size_bytes
        check_memory(needed_bytes, memory_limit_bytes, "the student")
        self._weights = PackedWeights(library, variant, self.precision)
        self._session = Session(library, self.config, self.context_tokens, kv_cache, self.max_threads)
        self._session.use(self._weights)
        self.threads = threads or self.max_threads
        self.instruction_set = self._session.instruction_set
        self._memory = PageMemory(self._session.page_bytes)
        self._lock = threading.Lock()
        self._prepared_bytes = 0
        self._whole = True
        retained_most = prefix_cache_bytes // self._session.page_bytes
        self._book = PageBook(self._memory, self._page_limit(self._weights.bytes), retained_most)
        self._forget_slots()

    @property
    def kept_bf16(self) -> tuple[str, ...]:
        """Matrices that are bfloat16 in every precision."""
        return self._variant.kept_bf16

    @property
    def offered(self) -> tuple[Precision, ...]:
        """Precisions that it can switch to, best first."""
        return offered_by(self._variant.precision)

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._session.threads

    @threads.setter
    def threads(self, count: int) -> None:
        check_threads(count, self.max_threads)
        self._session.threads = count

    def open(self) -> int:
        """Returns the slot of a new, empty sequence."""
        slot = heapq.heappop(self._free) if self._free else len(self._sequences)
        if slot == len(self._table):
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        self._sequences[slot], self._lengths[slot] = self._book.open(self.precision), 0
        return slot

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        """Lets a fresh slot take over what is cached of the beginning of a prompt; see `Engine.reuse`.

        Raises:
            EbbflowError: INVALID_REQUEST or CONTEXT_TOO_LONG.
        """
        check_empty(slot, self._lengths)
        check_tokens(token_ids, self.config.vocab_size, 0, self.context_tokens)
        sequence = self._sequences[slot]
        self._lengths[slot] = self._book.reuse(sequence, token_ids)
        self._table[slot, : len(sequence.pages)] = sequence.pages
        return self._lengths[slot]

    def forget_prompts(self) -> None:
        """Lets go of all that is cached of prompts; see `Engine.forget_prompts`."""
        self._book.forget()
        self._part()

    def close(self, slot: int) -> None:
        """Forgets a sequence.

        Raises:
            EbbflowError: INVALID_REQUEST if the slot is not open.
        """
        sequence = self._sequences.pop(slot, None)
        if sequence is None:
            raise EbbflowError(Reason.INVALID_REQUEST, f"slot {slot} is not open", field="slot")
        del self._lengths[slot]
        self._book.close(sequence)
        heapq.heappush(self._free, slot)
        if not self._sequences:
            self._forget_slots()

    def step(self, entries: Sequence[StepEntry]) -> list[Logits]:
        """Takes new tokens of any number of sequences in one forward pass; see `Engine.step`.

        Raises:
            EbbflowError: INVALID_REQUEST, CONTEXT_TOO_LONG, OUT_OF_MEMORY, or STATE_CONFLICT if replacing the weights
                has failed half-way; every slot is then as it was.
        """
        if not entries:
            return []
        self._check_whole()
        check_entries(entries, self._lengths, self.config.vocab_size, self.context_tokens)
        self._reserve(entries)
        logits_NV = self._session.logits(self._rows(entries), self._table, self._memory.addresses)
        found: list[Logits] = []
        begin = 0
        for entry in entries:
            end = begin + (1 if entry.want == "last" else len(entry.token_ids))
            found.append(logits_NV[begin] if entry.want == "last" else logits_NV[begin:end])
            begin = end
            self._keep(entry)
        return found

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Returns the mean of the last hidden states, [C].

        Raises:
            EbbflowError: INVALID_REQUEST, CONTEXT_TOO_LONG or OUT_OF_MEMORY.
        """
        self._check_whole()
        slot = self.open()
        try:
            entries = [StepEntry(slot, token_ids, "all")]
            check_entries(entries, self._lengths, self.config.vocab_size, self.context_tokens)
            self._reserve(entries)
            hidden_NC = self._session.hidden(self._rows(entries), self._table, self._memory.addresses)
        finally:
            self.close(slot)
        mean_C: npt.NDArray[np.float32] = hidden_NC.mean(axis=0)
        return mean_C

    def prepare(self, precision: str) -> Prepared:
        """Packs the weights of another precision, on any thread, beside running steps; see `Engine.prepare`.

        Raises:
            EbbflowError: INVALID_REQUEST, OUT_OF_MEMORY, or FILE_CORRUPT if the artefact has gone bad.
        """
        variant = self._variant
        chosen = self._require_offered(variant, precision)
        packed_bytes = Layout(self._library, variant, chosen).size_bytes
        self._account(packed_bytes)
        try:
            return PreparedWeights(self, variant, PackedWeights(self._library, variant, chosen))
        except BaseException:
            self._account(-packed_bytes)
            raise

    def switch(self, prepared: Prepared) -> None:
        """Computes with other weights from the next step on; see `Engine.switch`.

        Raises:
            EbbflowError: INVALID_REQUEST if it was discarded, used before or prepared for another release.
        """
        weights = prepared.take(self, self._variant) if isinstance(prepared, PreparedWeights) else None
        if weights is None:
            message = "these weights were discarded, used before or prepared for another release"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="prepared")
        old, self._weights = self._weights, weights
        self._session.use(weights)
        self.precision = weights.precision
        self._account(-weights.bytes)
        self._part()  # keys and values of two precisions are nobody else's beginning
        # Unmapping takes milliseconds, and so may the start of a `Thread`, which waits: no step should.
        _thread.start_new_thread(old.close, ())

    def replace(self, weights_path: Path) -> None:
        """Puts another artefact in place of this one, tensor by tensor; see `Engine.replace`.

        Raises:
            EbbflowError: STATE_CONFLICT, INVALID_REQUEST, FILE_CORRUPT or WEIGHTS_INVALID.
        """
        variant = read_variant(weights_path)
        check_replacement(self._sequences, self, variant)
        check_numbers(self._library, variant, self.precision)
        self._whole = False
        self._book.forget()
        self._weights.fill(variant)
        self._variant, self.config, self.weights_path, self._whole = variant, variant.config, weights_path, True

    def memory(self) -> EngineMemory:
        """Returns what it holds; of weights also those that are prepared. Any thread may ask."""
        book, page_bytes = self._book, self._session.page_bytes
        return EngineMemory(
            self._weights.bytes + self._prepared_bytes,
            book.allocated * page_bytes,
            book.used * page_bytes,
            book.hits_tokens,
            book.asked_tokens,
        )

    def shutdown(self) -> None:
        """Ends the threads and gives all memory back."""
        self._whole = False
        self._session.close()
        for sequence in self._sequences.values():
            self._book.close(sequence)
        self._forget_slots()
        self._book.forget()
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _part(self) -> None:
        """Lets no other sequence take over a beginning of those that are open."""
        for slot, sequence in self._sequences.items():
            if sequence.length:
                sequence.node = None
            else:
                self._sequences[slot] = self._book.open(self.precision)

    def _forget_slots(self) -> None:
        self._sequences: dict[int, Pages] = {}
        self._lengths: dict[int, int] = {}
        self._free: list[int] = []
        self._table = np.zeros((_FIRST_SLOTS, pages_for(self.context_tokens)), np.int32)

    def _reserve(self, entries: Sequence[StepEntry]) -> None:
        sequences = [self._sequences[entry.slot] for entry in entries]
        before = [len(sequence.pages) for sequence in sequences]
        self._book.reserve([(seq, len(entry.token_ids)) for seq, entry in zip(sequences, entries, strict=True)])
        for entry, sequence, had in zip(entries, sequences, before, strict=True):
            if len(sequence.pages) > had:
                self._table[entry.slot, had : len(sequence.pages)] = sequence.pages[had:]

    def _rows(self, entries: Sequence[StepEntry]) -> Rows:
        total = sum(len(entry.token_ids) for entry in entries)
        ids, positions, sequences = (np.empty(total, np.int32) for _ in range(3))
        outputs: list[int] = []
        begin = 0
        for entry in entries:
            end = begin + len(entry.token_ids)
            first = self._lengths[entry.slot]
            ids[begin:end] = entry.token_ids
            positions[begin:end] = first if end - begin == 1 else np.arange(first, first + end - begin)
            sequences[begin:end] = entry.slot
            outputs.extend([end - 1] if entry.want == "last" else range(begin, end))
            begin = end
        return Rows(ids, positions, sequences, np.array(outputs, np.int32))

    def _keep(self, entry: StepEntry) -> None:
        sequence = self._sequences[entry.slot]
        if self._book.keep(sequence, entry.token_ids):
            self._table[entry.slot, : len(sequence.pages)] = sequence.pages
        self._lengths[entry.slot] = sequence.length

    def _check_whole(self) -> None:
        if not self._whole:
            message = "the engine is shut down, or replacing its weights failed half-way: replace them or load it again"
            raise EbbflowError(Reason.STATE_CONFLICT, message)

    @staticmethod
    def _require_offered(variant: Variant, precision: str) -> Precision:
        if precision not in offered_by(variant.precision):
            message = f"an artefact in {variant.precision} does not give {precision!r:.20}"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="precision")
        return precision

    def _page_limit(self, weights_bytes: int) -> int | None:
        if self._limit_bytes is None:
            return None
        return (self._limit_bytes - self._fixed_bytes - weights_bytes) // self._session.page_bytes

    def _account(self, delta_bytes: int) -> None:
        """Counts bytes of prepared weights, and leaves the rest of the limit to the KV cache.

        Raises:
            EbbflowError: OUT_OF_MEMORY if what sequences hold would not fit any more; nothing has changed then.
        """
        with self._lock:
            prepared_bytes = self._prepared_bytes + delta_bytes
            self._book.set_limit(self._page_limit(self._weights.bytes + prepared_bytes))
            self._prepared_bytes = prepared_bytes


class PreparedWeights:
    """Weights of another precision of a release; see `Prepared`."""

    def __init__(self, engine: NativeEngine, variant: Variant, weights: PackedWeights) -> None:
        self.precision: Precision = weights.precision
        self.bytes = weights.bytes
        self._engine, self._variant = engine, variant
        self._weights: PackedWeights | None = weights
        self._lock = threading.Lock()

    def take(self, engine: NativeEngine, variant: Variant) -> PackedWeights | None:
        """Hands the weights out once, to the engine and release that they were prepared for."""
        with self._lock:
            if engine is not self._engine or variant is not self._variant:
                return None
            weights, self._weights = self._weights, None
            return weights

    def discard(self) -> None:
        """Gives the memory back, unless the weights were switched to."""
        weights = self.take(self._engine, self._variant)
        if weights is not None:
            weights.close()
            self._engine._account(-self.bytes)

    def __del__(self) -> None:
        self.discard()
