"""How well a student predicts texts: the measurements behind probe, evaluation card and gate.

Shapes: B windows, T positions, C chosen rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn import functional

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.losses import IGNORE, align
from ebbflow.cloud.distillation.mixture import encode_documents, pad
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.common.trust.manifest import Probe

_WINDOW_TOKENS = 512
_BATCH_TOKENS = 4096
_CHUNK_ROWS = 512


@torch.inference_mode()
def document_losses(student: Student, documents: Sequence[Sequence[int]], begin_id: int | None) -> list[float]:
    """Returns the total loss of each document in nats, over every token but the first and those that begin documents.

    Documents longer than a window (512 tokens, or the student's context) are read window by window.
    """
    size = min(_WINDOW_TOKENS, student.config.max_position_embeddings)
    windows = [
        (number, document[start : start + size + 1])
        for number, document in enumerate(documents)
        for start in range(0, len(document) - 1, size)
    ]
    windows.sort(key=lambda window: len(window[1]))
    totals = [0.0] * len(documents)
    for batch in _batches(windows):
        tokens, ignored = pad([window for _, window in batch], begin_id, 0)
        inputs_BT, labels_BT = align(torch.from_numpy(tokens), torch.from_numpy(ignored))
        for (number, _), loss in zip(batch, _row_losses(student, inputs_BT, labels_BT), strict=True):
            totals[number] += loss
    return totals


def probe_loss(student: Student, probe: Probe) -> float:
    """Returns the probe's loss in nats per predicted token, as a device measures it."""
    totals = document_losses(student, probe.token_ids, None)
    return probe.mean([total / (len(ids) - 1) for total, ids in zip(totals, probe.token_ids, strict=True)])


def bits_per_byte(student: Student, tokenizer: Tokenizer, texts: Sequence[Text]) -> tuple[float, Mapping[str, float]]:
    """Returns bits per UTF-8 byte over all texts and by topic; the token that ends a text counts as part of it."""
    documents = encode_documents(tokenizer, [text.text for text in texts])
    losses = document_losses(student, documents, tokenizer.bos_id)
    nats: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for text, loss in zip(texts, losses, strict=True):
        nats[text.topic] = nats.get(text.topic, 0.0) + loss
        sizes[text.topic] = sizes.get(text.topic, 0) + len(text.text.encode())
    by_topic = {topic: nats[topic] / math.log(2) / sizes[topic] for topic in nats}
    return sum(nats.values()) / math.log(2) / sum(sizes.values()), by_topic


def _batches(windows: Sequence[tuple[int, Sequence[int]]]) -> Iterator[list[tuple[int, Sequence[int]]]]:
    """Groups windows, sorted by length, so that padding is small and memory bounded."""
    batch: list[tuple[int, Sequence[int]]] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window[1]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _row_losses(student: Student, inputs_BT: torch.Tensor, labels_BT: torch.Tensor) -> list[float]:
    hidden_ND = student.hidden(inputs_BT).flatten(0, 1)
    labels_N = labels_BT.flatten()
    losses_N = torch.zeros(labels_N.shape, dtype=torch.float64)
    for rows_C in torch.nonzero(labels_N != IGNORE).squeeze(1).split(_CHUNK_ROWS):  # type: ignore[no-untyped-call]
        logits_CV = student.logits(hidden_ND[rows_C]).float()
        losses_N[rows_C] = functional.cross_entropy(logits_CV, labels_N[rows_C], reduction="none").double()
    result: list[float] = losses_N.view(labels_BT.shape).sum(1).tolist()
    return result
