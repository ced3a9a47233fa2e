"""What every engine does, whatever computes inside."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ebbflow.common.codes.artefact import Precision, Variant
from ebbflow.common.codes.derive import offered_by
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepEntry:
    """New tokens of one sequence."""

    slot: int
    token_ids: Sequence[int]
    """At least one."""
    want: Literal["last", "all"] = "last"
    """Logits behind the last new token, [V], or behind each, [T, V]."""


@dataclass(frozen=True)
class EngineMemory:
    """What an engine holds, in bytes, and what its prefix cache has saved since it was loaded, in tokens."""

    weights_bytes: int
    cache_bytes: int
    """Allocated for keys and values."""
    cache_used_bytes: int
    """Of these, what open sequences hold."""
    prefix_hits_tokens: int = 0
    """Tokens of prompts that needed no step."""
    prefix_asked_tokens: int = 0
    """Tokens of all prompts that were looked up."""


class Prepared(Protocol):
    """The weights of another precision, ready to be switched to; see `Engine.prepare`."""

    precision: Precision
    bytes: int
    """Of memory."""

    def discard(self) -> None:
        """Gives the memory back. Harmless after a switch, and when done twice."""


class Engine(Protocol):
    """Runs one student. One thread owns it: no method but `prepare` and `memory` may run beside another.

    Attributes:
        name: which engine this is: "native" or "torch".
        config: shape of the student.
        weights_path: the artefact that it runs.
        context_tokens: most tokens that a slot takes.
        reason: why this engine and not the native one; empty for the native one.
        instruction_set: of the kernels, such as "avx512" or "portable"; empty for torch.
        max_threads: most threads that it can compute with.
    """

    name: str
    config: StudentConfig
    weights_path: Path
    context_tokens: int
    reason: str
    instruction_set: str
    max_threads: int

    @property
    def kept_bf16(self) -> tuple[str, ...]:
        """Matrices that the release keeps in bfloat16 in every precision, by their names, sorted."""

    @property
    def precision(self) -> Precision:
        """Of the weights that compute now."""

    @property
    def offered(self) -> tuple[Precision, ...]:
        """Precisions that it can switch to, best first."""

    @property
    def threads(self) -> int:
        """Threads that compute. May be set between two steps, from 1 to `max_threads`; CONFIG_INVALID beyond."""

    @threads.setter
    def threads(self, count: int) -> None: ...

    def open(self) -> int:
        """Returns the slot of a new, empty sequence. Slots are unlimited; memory for one is taken as it grows."""

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        """Lets a fresh slot take over what is cached of the beginning of a prompt.

        Args:
            slot: open and empty.
            token_ids: the whole prompt.

        Returns:
            How many tokens need no step any more: fewer than the prompt has, and 0 for an engine without a prefix
            cache.

        Raises:
            EbbflowError: INVALID_REQUEST or CONTEXT_TOO_LONG; the slot is then as it was.
        """

    def forget_prompts(self) -> None:
        """Lets go of all that is cached of prompts; what runs keeps its own until it is closed."""

    def close(self, slot: int) -> None:
        """Forgets a sequence; its slot may be given out again.

        Raises:
            EbbflowError: INVALID_REQUEST if the slot is not open.
        """

    def step(self, entries: Sequence[StepEntry]) -> list[Logits]:
        """Takes new tokens of any number of sequences, of any lengths, in one forward pass.

        Returns:
            Float32 logits for each entry, in the order of `entries`.

        Raises:
            EbbflowError: INVALID_REQUEST, CONTEXT_TOO_LONG or OUT_OF_MEMORY; every slot is then as it was.
        """

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Returns the mean of the last hidden states, [C], touching no slot.

        Raises:
            EbbflowError: INVALID_REQUEST, CONTEXT_TOO_LONG or OUT_OF_MEMORY.
        """

    def prepare(self, precision: str) -> Prepared:
        """Gets the weights of another precision of the same release ready. Any thread may, beside running steps.

        Raises:
            EbbflowError: INVALID_REQUEST if the precision is not in `offered`, OUT_OF_MEMORY if the weights of both do
                not fit the memory limit.
        """

    def switch(self, prepared: Prepared) -> None:
        """Computes with other weights from the next step on, in microseconds; the old ones are given back.

        Sequences that are open carry on with the keys and values that they have.

        Raises:
            EbbflowError: INVALID_REQUEST if it was discarded, used before or prepared for another release.
        """

    def replace(self, weights_path: Path) -> None:
        """Puts another artefact of the same shape and precision in place of this one, tensor by tensor.

        No second copy is made; no slot may be open. When it fails before the first byte, nothing has changed; after
        that, the engine refuses every step until a `replace` has succeeded.

        Raises:
            EbbflowError: STATE_CONFLICT if slots are open, INVALID_REQUEST if the artefact has another shape or does
                not hold this precision, FILE_CORRUPT if it is not whole.
        """

    def memory(self) -> EngineMemory:
        """Returns what it holds now. Any thread may ask."""

    def shutdown(self) -> None:
        """Gives all memory and threads back at once, as collecting the engine would. Nothing may be asked after it."""


def check_entries(
    entries: Sequence[StepEntry], lengths: Mapping[int, int], vocab_size: int, context_tokens: int
) -> None:
    """Holds the entries of a step against the open slots.

    Args:
        entries: what is asked for.
        lengths: tokens in each open slot.
        vocab_size: tokens are below it.
        context_tokens: most tokens of a slot.

    Raises:
        EbbflowError: INVALID_REQUEST for a slot that is not open or named twice, an empty entry or a token that is not
            in the vocabulary; CONTEXT_TOO_LONG for too many tokens.
    """
    seen: set[int] = set()
    for entry in entries:
        if entry.slot not in lengths or entry.slot in seen:
            fault = "is named twice in one step" if entry.slot in seen else "is not open"
            raise EbbflowError(Reason.INVALID_REQUEST, f"slot {entry.slot} {fault}", field="slot")
        seen.add(entry.slot)
        check_tokens(entry.token_ids, vocab_size, lengths[entry.slot], context_tokens)


def check_empty(slot: int, lengths: Mapping[int, int]) -> None:
    """Holds that a slot is open and has no tokens yet.

    Raises:
        EbbflowError: INVALID_REQUEST.
    """
    if lengths.get(slot) != 0:
        fault = "has tokens already" if slot in lengths else "is not open"
        raise EbbflowError(Reason.INVALID_REQUEST, f"slot {slot} {fault}", field="slot")


def check_threads(count: int, most: int) -> None:
    """Holds a number of threads against the most.

    Raises:
        EbbflowError: CONFIG_INVALID.
    """
    if not 1 <= count <= most:
        raise EbbflowError(Reason.CONFIG_INVALID, f"threads must be from 1 to {most}, not {count}")


def check_replacement(slots: Sized, engine: Engine, variant: Variant) -> None:
    """Holds what shall replace an artefact in place against that artefact.

    Args:
        slots: those that are open.
        engine: what computes now.
        variant: what shall replace it.

    Raises:
        EbbflowError: STATE_CONFLICT if a slot is open, INVALID_REQUEST if the other artefact does not fit.
    """
    if len(slots):
        raise EbbflowError(
            Reason.STATE_CONFLICT, f"{len(slots)} sequences are open; drain them before replacing weights"
        )
    if _computed(engine.config) != _computed(variant.config):
        raise EbbflowError(Reason.INVALID_REQUEST, "the other artefact has another shape", field="weights_path")
    if engine.kept_bf16 != variant.kept_bf16:
        message = "the other artefact keeps other matrices in bf16"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="weights_path")
    if engine.precision not in offered_by(variant.precision):
        message = f"an artefact in {variant.precision} does not hold {engine.precision}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="weights_path")


def _computed(config: StudentConfig) -> StudentConfig:
    """Leaves out of a shape what no engine computes with."""
    return replace(config, pad_token_id=None, bos_token_id=None, eos_token_id=None)


def check_tokens(token_ids: Sequence[int], vocab_size: int, before: int, context_tokens: int) -> None:
    """Checks new tokens of a sequence that has `before` tokens already.

    Raises:
        EbbflowError: INVALID_REQUEST or CONTEXT_TOO_LONG as in `check_entries`.
    """
    if len(token_ids) == 0:
        raise EbbflowError(Reason.INVALID_REQUEST, "at least one token is needed", field="token_ids")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        message = f"a token is outside the vocabulary of {vocab_size}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="token_ids")
    total = before + len(token_ids)
    if total > context_tokens:
        message = f"{total} tokens do not fit into a context of {context_tokens}"
        raise EbbflowError(Reason.CONTEXT_TOO_LONG, message, tokens=total, context_tokens=context_tokens)


def check_memory(needed_bytes: int, limit_bytes: int | None, what: str) -> None:
    """Refuses what would not fit.

    Raises:
        EbbflowError: OUT_OF_MEMORY if `needed_bytes` is above the limit.
    """
    if limit_bytes is not None and needed_bytes > limit_bytes:
        facts: dict[str, Any] = {"needed_bytes": needed_bytes, "limit_bytes": limit_bytes}
        message = f"{what} needs {needed_bytes} bytes where {limit_bytes} are allowed"
        raise EbbflowError(Reason.OUT_OF_MEMORY, message, **facts)
