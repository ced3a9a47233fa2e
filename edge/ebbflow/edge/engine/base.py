"""What every engine does, whatever computes inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

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


class Engine(Protocol):
    """Runs one student. One thread owns it: no method may run beside another.

    Attributes:
        name: which engine this is, such as "torch".
        precision: of the weights: "bf16", "int8" or "int4".
        config: shape of the student.
        context_tokens: most tokens that a slot takes.
    """

    name: str
    precision: str
    config: StudentConfig
    context_tokens: int

    def open(self) -> int:
        """Returns the slot of a new, empty sequence. Slots are unlimited; memory for one is taken as it grows."""

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
            EbbflowError: INVALID_REQUEST or CONTEXT_TOO_LONG.
        """


def check_entries(entries: Sequence[StepEntry], lengths: dict[int, int], vocab_size: int, context_tokens: int) -> None:
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
