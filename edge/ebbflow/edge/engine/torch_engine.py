"""The pure-torch engine: the reference for every other engine, and the fallback where none is built.

A step lays the new tokens of all sequences in one row, so that every projection reads its weights once; only the
attention is done per sequence, and for all sequences with one new token together.

Letters of shapes as in `ebbflow.common.student.model`; N tokens of a step, R slots, L layers.
"""

import heapq
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ebbflow.common.codes.artefact import KVKind, Precision, read_variant
from ebbflow.common.codes.derive import weight_as
from ebbflow.common.codes.twin import build_student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student, attend_causally
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

_NUMBER_BYTES = 4
_SMALLEST_CAPACITY_TOKENS = 64


class TorchEngine:
    """Runs a student in float32 on the CPU, whatever the precision of its artefact; see `Engine`."""

    name = "torch"
    instruction_set = ""

    def __init__(
        self,
        weights_path: Path,
        *,
        threads: int | None = None,
        context_tokens: int | None = None,
        memory_limit_bytes: int | None = None,
        kv_cache: KVKind = "bf16",
        precision: Precision | None = None,
        reason: str = "",
    ) -> None:
        """Loads an artefact.

        Args:
            weights_path: an artefact of any precision.
            threads: threads of torch, which are those of the whole process; None leaves them as they are.
            context_tokens: most tokens of a slot; None or more than the student's own means the student's own.
            memory_limit_bytes: most bytes of weights and KV cache together; None for no limit.
            kv_cache: what keys and values are rounded to; they take the memory of float32 all the same.
            precision: to compute with; None means the artefact's own.
            reason: why it is not the native engine that runs.

        Raises:
            EbbflowError: FILE_CORRUPT if the artefact is not whole; INVALID_REQUEST if it does not hold the precision;
                OUT_OF_MEMORY if its weights are above the limit or above what the machine has.
        """
        variant = read_variant(weights_path)
        self.reason, self.weights_path = reason, weights_path
        self.config: StudentConfig = variant.config
        self.kept_bf16: tuple[str, ...] = variant.kept_bf16
        self.precision: Precision = precision or variant.precision
        self.offered: tuple[Precision, ...] = (self.precision,)
        longest = variant.config.max_position_embeddings
        self.context_tokens: int = min(context_tokens or longest, longest)
        self._weights_bytes = variant.config.parameters * _NUMBER_BYTES
        check_memory(self._weights_bytes, memory_limit_bytes, "the student")
        self.max_threads: int = max(os.cpu_count() or 1, threads or 1)
        if threads is not None:
            self.threads = threads
        self._kv_cache: KVKind = kv_cache
        try:
            self._student: Student = build_student(variant, precision, kv_cache)
        except MemoryError as error:
            raise EbbflowError(Reason.OUT_OF_MEMORY, "there is no memory for the student") from error
        cache_limit_bytes = None if memory_limit_bytes is None else memory_limit_bytes - self._weights_bytes
        self._slots = _Slots(self.config, cache_limit_bytes)

    @property
    def threads(self) -> int:
        """Threads of torch, which are those of the whole process."""
        return torch.get_num_threads()

    @threads.setter
    def threads(self, count: int) -> None:
        check_threads(count, self.max_threads)
        torch.set_num_threads(count)

    def open(self) -> int:
        """Returns the slot of a new, empty sequence."""
        return self._slots.open()

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        """Returns 0: nothing is cached beyond its slot.

        Raises:
            EbbflowError: INVALID_REQUEST or CONTEXT_TOO_LONG.
        """
        check_empty(slot, self._slots.lengths)
        check_tokens(token_ids, self.config.vocab_size, 0, self.context_tokens)
        return 0

    def forget_prompts(self) -> None:
        """Does nothing: nothing is cached beyond its slot."""

    def prepare(self, precision: str) -> Prepared:
        """Refuses: this engine has one precision.

        Raises:
            EbbflowError: INVALID_REQUEST.
        """
        message = f"the torch engine computes in {self.precision} only, not in {precision!r:.20}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="precision")

    def switch(self, prepared: Prepared) -> None:
        """Refuses: this engine prepares nothing.

        Raises:
            EbbflowError: INVALID_REQUEST.
        """
        self.prepare(prepared.precision)

    def replace(self, weights_path: Path) -> None:
        """Puts another artefact in place of this one, tensor by tensor; see `Engine.replace`.

        Raises:
            EbbflowError: STATE_CONFLICT, INVALID_REQUEST or FILE_CORRUPT; nothing has changed.
        """
        variant = read_variant(weights_path)
        check_replacement(self._slots.lengths, self, variant)
        names = list(variant.config.tensor_shapes())
        for name in names:  # all is read once before the first byte changes
            weight_as(variant, name, self.precision)
        parameters = dict(self._student.named_parameters())
        for name in names:
            parameters[name].data.copy_(torch.from_numpy(weight_as(variant, name, self.precision)))
        self.config, self.weights_path = variant.config, weights_path

    def memory(self) -> EngineMemory:
        """Returns what it holds."""
        held, used = self._slots.held_bytes()
        return EngineMemory(self._weights_bytes, held, used)

    def shutdown(self) -> None:
        """Gives the memory back."""
        self._slots = _Slots(self.config, 0)
        self._student = Student.empty(self.config)
        self._weights_bytes = 0

    def close(self, slot: int) -> None:
        """Forgets a sequence.

        Raises:
            EbbflowError: INVALID_REQUEST if the slot is not open.
        """
        self._slots.close(slot)

    @torch.inference_mode()
    def step(self, entries: Sequence[StepEntry]) -> list[Logits]:
        """Takes new tokens of any number of sequences in one forward pass; see `Engine.step`.

        Raises:
            EbbflowError: INVALID_REQUEST, CONTEXT_TOO_LONG or OUT_OF_MEMORY; every slot is then as it was.
        """
        if not entries:
            return []
        check_entries(entries, self._slots.lengths, self.config.vocab_size, self.context_tokens)
        # Sequences with one new token come first, by slot: their attention is one call.
        order = sorted(range(len(entries)), key=lambda i: (len(entries[i].token_ids) > 1, entries[i].slot))
        step = self._slots.prepare([(entries[index].slot, len(entries[index].token_ids)) for index in order])
        tokens_BT = torch.tensor([[token for index in order for token in entries[index].token_ids]])
        hidden_NC = self._student.hidden(tokens_BT, step)[0]
        wanted = [rows[-1:] if entries[i].want == "last" else rows for i, rows in zip(order, step.rows(), strict=True)]
        logits_NV = self._student.logits(hidden_NC[torch.cat(wanted)]).numpy()
        found: list[Logits] = [logits_NV] * len(entries)
        begin = 0
        for index, rows in zip(order, wanted, strict=True):
            piece = logits_NV[begin : begin + len(rows)]
            found[index] = piece[0] if entries[index].want == "last" else piece
            begin += len(rows)
        return found

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Returns the mean of the last hidden states, [C].

        Raises:
            EbbflowError: INVALID_REQUEST or CONTEXT_TOO_LONG.
        """
        check_tokens(token_ids, self.config.vocab_size, 0, self.context_tokens)
        mean_C: npt.NDArray[np.float32] = self._student.hidden(torch.tensor([list(token_ids)]))[0].mean(0).numpy()
        return mean_C


class _Slots:
    """Keys and values of all sequences: one tensor of each per layer, that grows with the longest sequence.

    It is the simplest memory whose batches are views. It costs every slot the length of the longest, so it goes back to
    nothing when no slot is open.
    """

    def __init__(self, config: StudentConfig, limit_bytes: int | None) -> None:
        self._config, self._limit_bytes = config, limit_bytes
        self.lengths: dict[int, int] = {}
        self._free: list[int] = []
        self._forget()

    def _forget(self) -> None:
        self._have_slots, self._have_tokens = 0, 0
        self.keys_LRKSD = [torch.zeros(self._shape(0, 0)) for _ in range(self._config.num_hidden_layers)]
        self.values_LRKSD = list(self.keys_LRKSD)

    def open(self) -> int:
        slot = heapq.heappop(self._free) if self._free else len(self.lengths)
        self.lengths[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        if self.lengths.pop(slot, None) is None:
            raise EbbflowError(Reason.INVALID_REQUEST, f"slot {slot} is not open", field="slot")
        heapq.heappush(self._free, slot)
        if not self.lengths:
            self._free = []
            self._forget()

    def held_bytes(self) -> tuple[int, int]:
        """Bytes that are allocated, and those that hold tokens."""
        token_bytes = 2 * self._config.num_hidden_layers * self._config.key_width * _NUMBER_BYTES
        return self._have_slots * self._have_tokens * token_bytes, sum(list(self.lengths.values())) * token_bytes

    def prepare(self, news: list[tuple[int, int]]) -> "_Step":
        """Makes room for new tokens, given as slots and counts, without counting them yet."""
        spans = [_Span(slot, self.lengths[slot], self.lengths[slot] + count) for slot, count in news]
        self._reserve(1 + max(span.slot for span in spans), max(span.end for span in spans))
        return _Step(self, spans)

    def _reserve(self, slots: int, tokens: int) -> None:
        if slots <= self._have_slots and tokens <= self._have_tokens:
            return
        slots = max(slots, self._have_slots)
        tokens = max(tokens, self._have_tokens)
        if tokens > self._have_tokens:  # some to spare, unless that is what would not fit
            ample = min(self._config.max_position_embeddings, max(_SMALLEST_CAPACITY_TOKENS, tokens * 3 // 2))
            tokens = ample if self._fits(slots, ample) else tokens
        check_memory(self._size_bytes(slots, tokens), self._limit_bytes, "the KV cache")
        try:
            for caches in (self.keys_LRKSD, self.values_LRKSD):
                for layer, old_RKSD in enumerate(caches):
                    caches[layer] = self._grown(old_RKSD, slots, tokens)
        except RuntimeError as error:  # what torch's allocator raises; layers that did grow stay so and do no harm
            raise EbbflowError(Reason.OUT_OF_MEMORY, "there is no memory for the KV cache") from error
        self._have_slots, self._have_tokens = slots, tokens

    def _grown(self, old_RKSD: Tensor, slots: int, tokens: int) -> Tensor:
        new_RKSD = torch.zeros(self._shape(slots, tokens))
        kept = (slice(self._have_slots), slice(None), slice(self._have_tokens))
        new_RKSD[kept] = old_RKSD[kept]
        return new_RKSD

    def _fits(self, slots: int, tokens: int) -> bool:
        return self._limit_bytes is None or self._size_bytes(slots, tokens) <= self._limit_bytes

    def _shape(self, slots: int, tokens: int) -> tuple[int, int, int, int]:
        return slots, self._config.num_key_value_heads, tokens, self._config.head_dim

    def _size_bytes(self, slots: int, tokens: int) -> int:
        """Bytes of all layers, and of one more that is held twice while it grows."""
        return 2 * (self._config.num_hidden_layers + 1) * math.prod(self._shape(slots, tokens)) * _NUMBER_BYTES


@dataclass(frozen=True)
class _Span:
    """New tokens of one slot: their positions from and to."""

    slot: int
    begin: int
    end: int


class _Step:
    """The memory of one forward pass over one row of tokens: first those that come alone, then the longer spans."""

    def __init__(self, slots: _Slots, spans: list[_Span]) -> None:
        self._slots, self._spans = slots, spans
        self._alone = [span for span in spans if span.end - span.begin == 1]
        self._longer = spans[len(self._alone) :]
        self._positions_N = torch.cat([torch.arange(span.begin, span.end) for span in spans])
        self._prepare_alone()

    def _prepare_alone(self) -> None:
        """Chooses the rows of the cache that single tokens look at, and masks what lies beyond each."""
        alone = self._alone
        self._rows = torch.tensor([span.slot for span in alone], dtype=torch.long)
        self._places = torch.tensor([span.begin for span in alone], dtype=torch.long)
        self._longest = max((span.end for span in alone), default=0)
        # Neighbouring rows in their order are a view; others cost a copy of what they hold.
        first = alone[0].slot if alone else 0
        self._view = [span.slot for span in alone] == list(range(first, first + len(alone)))
        self._window = slice(first, first + len(alone))
        mask_RS = torch.arange(self._longest)[None] <= self._places[:, None]
        self._mask_R11S = None if bool(mask_RS.all()) else mask_RS[:, None, None]

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Returns the position of each token in its own sequence."""
        del tokens_BT
        return self._positions_N

    def attend(self, layer: int, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        """Keeps the new keys and values and attends, each token within its own sequence."""
        keys_RKSD, values_RKSD = self._slots.keys_LRKSD[layer], self._slots.values_LRKSD[layer]
        mixed_BHTD = torch.empty_like(query_BHTD)
        begin = len(self._alone)
        if begin:
            keys_RKSD[self._rows, :, self._places] = key_BKTD[0, :, :begin].transpose(0, 1)
            values_RKSD[self._rows, :, self._places] = value_BKTD[0, :, :begin].transpose(0, 1)
            mixed_BHTD[0, :, :begin] = self._attend_alone(query_BHTD[0, :, :begin], keys_RKSD, values_RKSD)
        for span in self._longer:
            end = begin + span.end - span.begin
            keys_RKSD[span.slot, :, span.begin : span.end] = key_BKTD[0, :, begin:end]
            values_RKSD[span.slot, :, span.begin : span.end] = value_BKTD[0, :, begin:end]
            seen_BKSD = (cache[span.slot, None, :, : span.end] for cache in (keys_RKSD, values_RKSD))
            mixed_BHTD[:, :, begin:end] = attend_causally(query_BHTD[:, :, begin:end], *seen_BKSD)
            begin = end
        return mixed_BHTD

    def _attend_alone(self, query_HRD: Tensor, keys_RKSD: Tensor, values_RKSD: Tensor) -> Tensor:
        """One new token of each of many sequences; returns [H, R, D]."""
        rows = self._window if self._view else self._rows
        keys_RKSD, values_RKSD = keys_RKSD[rows, :, : self._longest], values_RKSD[rows, :, : self._longest]
        kv_heads, width = keys_RKSD.shape[1], keys_RKSD.shape[3]
        # The query heads that share a key head stand as rows of one query, so that its keys are read once.
        query_RKGD = query_HRD.transpose(0, 1).reshape(len(self._alone), kv_heads, -1, width)
        mixed_RKGD = functional.scaled_dot_product_attention(
            query_RKGD, keys_RKSD, values_RKSD, attn_mask=self._mask_R11S
        )
        return mixed_RKGD.flatten(1, 2).transpose(0, 1)

    def advance(self, tokens_BT: Tensor) -> None:
        """Counts the new tokens as kept."""
        del tokens_BT
        for span in self._spans:
            self._slots.lengths[span.slot] = span.end

    def rows(self) -> list[Tensor]:
        """Where each span lies among the tokens of the step."""
        return list(torch.split(torch.arange(len(self._positions_N)), [span.end - span.begin for span in self._spans]))
