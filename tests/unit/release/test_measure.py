import math
from collections.abc import Sequence

import pytest
import tiny_models
import torch
from torch.nn import functional

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.release import measure
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.trust.manifest import Probe

CONFIG = StudentConfig(
    vocab_size=tiny_models.VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=16,
)
BEGIN = 1


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.random(CONFIG, 0, std=0.3).requires_grad_(False)


def _reference(student: Student, document: Sequence[int]) -> float:
    """Window by window, one document at a time."""
    total = 0.0
    for start in range(0, len(document) - 1, 16):
        window = torch.tensor([document[start : start + 17]])
        losses = functional.cross_entropy(student(window[:, :-1])[0].double(), window[0, 1:], reduction="none")
        total += float(losses[window[0, 1:] != BEGIN].sum())
    return total


def test_documents_of_any_length_are_measured_as_if_alone(student: Student) -> None:
    generator = torch.Generator().manual_seed(0)
    documents = [
        [BEGIN, *torch.randint(3, 300, (length,), generator=generator).tolist()]
        for length in (1, 5, 15, 16, 17, 31, 40, 64)
    ]
    found = measure.document_losses(student, documents, BEGIN)
    assert found == pytest.approx([_reference(student, document) for document in documents], rel=1e-5)


def test_small_batches_change_nothing(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[BEGIN, *range(10, 10 + length)] for length in range(1, 14)]
    whole = measure.document_losses(student, documents, BEGIN)
    monkeypatch.setattr(measure, "_BATCH_TOKENS", 20)
    monkeypatch.setattr(measure, "_CHUNK_ROWS", 3)
    assert measure.document_losses(student, documents, BEGIN) == pytest.approx(whole, rel=1e-6)


def test_the_probes_loss_is_the_mean_over_predicted_tokens(student: Student) -> None:
    probe = Probe(((1, 20, 30), (1, 40, 50, 60, 70)), 0.1)
    expected = sum(_reference(student, ids) for ids in probe.token_ids) / 6
    assert measure.probe_loss(student, probe) == pytest.approx(expected, rel=1e-5)


def test_bits_count_the_bytes_of_texts_by_topic(student: Student) -> None:
    tokenizer = tiny_models.tokenizer()
    texts = [Text("sea", "the tide", "gate"), Text("sky", "clouds é", "gate"), Text("sea", "a ship", "gate")]
    overall, by_topic = measure.bits_per_byte(student, tokenizer, texts)
    bits = [
        _reference(student, [*tokenizer.encode(text.text, bos=True), tokenizer.eos_id]) / math.log(2) for text in texts
    ]
    assert by_topic == pytest.approx({"sea": (bits[0] + bits[2]) / 14, "sky": bits[1] / 9}, rel=1e-5)
    assert overall == pytest.approx(sum(bits) / 23, rel=1e-5)
