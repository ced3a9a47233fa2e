"""What the teacher computes for its callers: continuations and log-probabilities, many texts at once.

Shapes: B sequences, T positions, C rows of one chunk, K alternatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ebbflow.cloud.teacher.endings import Ending
from ebbflow.cloud.teacher.model import Teacher

_CHUNK_ROWS = 64


@dataclass(frozen=True)
class Generation:
    """One prompt to continue."""

    token_ids: Sequence[int]
    """At least one."""
    max_tokens: int
    temperature: float
    """0 picks the likeliest token."""
    seed: Sequence[int]
    """Of the random choice; the same seed gives the same text."""
    stop: Sequence[str] = ()
    """Texts after which nothing more is written; they are part of what was."""


@dataclass(frozen=True)
class Scoring:
    """One text to score."""

    token_ids: Sequence[int]
    """At least two."""
    top_count: int


@dataclass(frozen=True)
class Score:
    """Natural log-probabilities of every token after the first."""

    token_log_probs: list[float]
    top_token_ids: list[int]
    """`top_count` for each position, in falling order."""
    top_log_probs: list[float]


def answer(teacher: Teacher, jobs: Sequence[Generation | Scoring]) -> Sequence[list[int] | Score]:
    """Computes a batch of jobs of one kind."""
    if isinstance(jobs[0], Generation):
        return generate(teacher, [job for job in jobs if isinstance(job, Generation)])
    return score(teacher, [job for job in jobs if isinstance(job, Scoring)])


@torch.inference_mode()
def generate(teacher: Teacher, jobs: Sequence[Generation]) -> list[list[int]]:
    """Continues prompts side by side; each ends at its stop texts, its `max_tokens` or the teacher's context."""
    eos = teacher.tokenizer.eos_id
    limits = [min(job.max_tokens, teacher.context_tokens - len(job.token_ids)) for job in jobs]
    endings = [Ending(teacher.tokenizer, job.stop) for job in jobs]
    randoms = [np.random.default_rng(list(job.seed)) for job in jobs]
    temperatures_B = torch.tensor([job.temperature for job in jobs], dtype=torch.float64)
    written: list[list[int]] = [[] for _ in jobs]
    running = [limit > 0 for limit in limits]
    reader = _Reader(teacher, [job.token_ids for job in jobs])
    while any(running):
        uniform_B = torch.tensor([random.random() for random in randoms], dtype=torch.float64)
        chosen = _choose(reader.logits_BV, temperatures_B, uniform_B)
        for row, token in enumerate(chosen):
            if running[row] and token != eos:
                written[row].append(token)
            running[row] = running[row] and token != eos and len(written[row]) < limits[row]
            running[row] = running[row] and not endings[row].reached(written[row])
        if any(running):
            reader.read(chosen)
    return written


@torch.inference_mode()
def score(teacher: Teacher, jobs: Sequence[Scoring]) -> list[Score]:
    """Returns the log-probabilities of texts; a padded neighbour changes nothing, since the teacher looks back only."""
    longest = max(len(job.token_ids) for job in jobs)
    tokens_BT = torch.full((len(jobs), longest), teacher.tokenizer.eos_id)
    for row, job in enumerate(jobs):
        tokens_BT[row, : len(job.token_ids)] = torch.tensor(job.token_ids)
    rows = teacher.rows(tokens_BT)
    return [_score_one(rows, row * longest, job) for row, job in enumerate(jobs)]


def _score_one(rows: Any, offset: int, job: Scoring) -> Score:
    labels = torch.tensor(job.token_ids[1:])
    result = Score([], [], [])
    for index_C in torch.arange(len(labels)).split(_CHUNK_ROWS):  # type: ignore[no-untyped-call]
        log_probs_CV = torch.log_softmax(rows(index_C + offset).float(), 1)
        result.token_log_probs.extend(log_probs_CV.gather(1, labels[index_C].unsqueeze(1)).squeeze(1).tolist())
        if job.top_count:
            values_CK, ids_CK = log_probs_CV.topk(job.top_count, 1)
            result.top_token_ids.extend(ids_CK.flatten().tolist())
            result.top_log_probs.extend(values_CK.flatten().tolist())
    return result


def _choose(logits_BV: Tensor, temperatures_B: Tensor, uniform_B: Tensor) -> list[int]:
    """Picks one token for each row: the likeliest, or by inverting the cumulative distribution at `uniform_B`."""
    greedy_B = logits_BV.argmax(1)
    if not temperatures_B.any():
        return [int(token) for token in greedy_B]
    scaled_BV = logits_BV.double() / temperatures_B.clamp(min=1e-6).unsqueeze(1)
    cumulative_BV = torch.softmax(scaled_BV, 1).cumsum(1)
    target_B1 = (uniform_B * cumulative_BV[:, -1]).unsqueeze(1)
    sampled_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)
    return [int(token) for token in torch.where(temperatures_B > 0, sampled_B, greedy_B)]


class _Reader:
    """Prompts of unequal length, padded on the left, and the tokens that follow them.

    Attributes:
        logits_BV: of the next token of each row, float32.
    """

    def __init__(self, teacher: Teacher, prompts: Sequence[Sequence[int]]) -> None:
        self._teacher = teacher
        longest = max(map(len, prompts))
        tokens_BT = torch.full((len(prompts), longest), teacher.tokenizer.pad_id)
        self._mask_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            self._mask_BT[row, longest - len(prompt) :] = 1
        self._cache = DynamicCache(config=teacher.model.config)
        positions_BT = (self._mask_BT.cumsum(1) - 1).clamp(min=0)
        self._position_B = positions_BT[:, -1]
        self.logits_BV = self._forward(tokens_BT, positions_BT)

    def read(self, tokens: Sequence[int]) -> None:
        """Reads one more token of each row."""
        self._position_B = self._position_B + 1
        self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=1)
        self.logits_BV = self._forward(torch.tensor(tokens).unsqueeze(1), self._position_B.unsqueeze(1))

    def _forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        output = self._teacher.model(
            input_ids=tokens_BT,
            attention_mask=self._mask_BT,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV
