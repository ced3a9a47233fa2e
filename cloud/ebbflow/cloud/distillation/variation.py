"""A teacher that writes variations of prompts.

It can be asked in two manners. "continue": it reads the beginning of the prompt and goes on in its own words, which any
model does that has learnt texts of this kind. "list": it reads a list of similar texts that ends with the prompt, and
writes the next entry, which larger models do. Which of them a teacher understands is found out by trying.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ebbflow.cloud.feedback.generation import Wish
from ebbflow.cloud.teacher.model import Teacher

BATCH = 16
TEMPERATURE = 1.0
TOP_P = 0.95
_LEAST_KEPT, _MOST_KEPT = 0.25, 0.75


class TeacherVariator:
    """Varies prompts by sampling from a teacher; see `feedback.generation.Variator`."""

    manners = ("continue", "list")

    def __init__(self, teacher: Teacher, check: Callable[[], None] = lambda: None) -> None:
        """Takes the teacher.

        Args:
            teacher: a causal model.
            check: called before every batch; what it raises ends the work.
        """
        self._teacher, self._check = teacher, check

    @property
    def vocabulary_size(self) -> int:
        """Number of the teacher's tokens."""
        return self._teacher.tokenizer.size

    def encode(self, text: str) -> Sequence[int]:
        """Returns the teacher's tokens of a text."""
        return self._teacher.tokenizer.encode(text)

    def vary(self, wishes: Sequence[Wish], most_tokens: int, seed: int) -> list[str]:
        """Writes one text for each wish; an empty one where it found no end within `most_tokens`."""
        rng = np.random.default_rng([seed, 0])
        heads = [self._head(wish, rng) for wish in wishes]
        written: list[str] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for begin in range(0, len(wishes), BATCH):
                self._check()
                batch = slice(begin, begin + BATCH)
                tails = self._sample([read for read, _ in heads[batch]], most_tokens)
                for wish, (_, kept), tail in zip(wishes[batch], heads[batch], tails, strict=True):
                    written.append(self._text(wish, kept, tail))
        return written

    def _head(self, wish: Wish, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Returns the tokens that the teacher reads, and those of them that begin its text."""
        tokenizer = self._teacher.tokenizer
        if wish.manner == "list":
            entries = [_flat(text) for text in (*wish.examples, wish.text)]
            lines = "".join(f"{number}. {entry}\n" for number, entry in enumerate(entries, 1))
            head = f"Different texts about {wish.topic}:\n{lines}{len(entries) + 1}."
            return tokenizer.encode(head, bos=True), []
        ids = tokenizer.encode(wish.text)
        kept = ids[: max(1, int(len(ids) * rng.uniform(_LEAST_KEPT, _MOST_KEPT)))]
        return [*tokenizer.encode("", bos=True), *kept], kept

    def _text(self, wish: Wish, kept: Sequence[int], tail: Sequence[int]) -> str:
        """Returns what was written, up to its end; nothing if there is none."""
        tokenizer = self._teacher.tokenizer
        ended = tokenizer.eos_id in tail
        ids = [*kept, *(tail[: list(tail).index(tokenizer.eos_id)] if ended else tail)]
        text = tokenizer.decode(ids)
        if wish.manner == "list":
            text, line_end, _ = text.strip().partition("\n")
            ended = ended or bool(line_end)
        return text.strip() if ended else ""

    @torch.inference_mode()
    def _sample(self, heads: Sequence[Sequence[int]], most_tokens: int) -> list[list[int]]:
        """Samples a continuation of each head, end token included where there is one."""
        tokenizer, model = self._teacher.tokenizer, self._teacher.model
        room = max(1, self._teacher.context_tokens - most_tokens)
        tokens_BT, real_BT = _pad_left([list(head)[-room:] for head in heads], tokenizer.pad_id)
        configuration: Any = transformers.GenerationConfig
        plan = configuration(
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=most_tokens,
            pad_token_id=tokenizer.pad_id,
            eos_token_id=tokenizer.eos_id,
            bos_token_id=tokenizer.bos_id,
        )
        device = next(model.parameters()).device
        sampled_BT = model.generate(
            input_ids=tokens_BT.to(device), attention_mask=real_BT.to(device), generation_config=plan
        )
        rows: list[list[int]] = sampled_BT[:, tokens_BT.shape[1] :].tolist()
        return rows


def _flat(text: str) -> str:
    return " ".join(text.split())


def _pad_left(heads: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Lays sequences side by side with their ends aligned; returns tokens and what is no filling, both [B, T]."""
    longest = max(map(len, heads))
    tokens_BT = torch.full((len(heads), longest), fill, dtype=torch.int64)
    real_BT = torch.zeros((len(heads), longest), dtype=torch.int64)
    for row, head in enumerate(heads):
        tokens_BT[row, longest - len(head) :] = torch.tensor(head)
        real_BT[row, longest - len(head) :] = 1
    return tokens_BT, real_BT
