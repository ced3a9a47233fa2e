"""The torch engine computes in ragged steps what the student computes at once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.common.codes.artefact import PRECISIONS, write_variant
from ebbflow.common.codes.twin import load_student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.edge.engine.base import Logits, StepEntry
from ebbflow.edge.engine.torch_engine import TorchEngine

CONFIG = StudentConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=96,
    tie_word_embeddings=False,
)
WEIGHTS_BYTES = CONFIG.parameters * 4


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artefact") / "weights"
    student = Student.random(CONFIG, seed=3, std=0.2)
    tensors = {name: tensor.numpy() for name, tensor in student.state_dict().items()}
    write_variant(path, tensors, CONFIG, "int8")
    return path


@pytest.fixture(scope="module")
def student(artefact: Path) -> Student:
    return load_student(artefact)


def reference(student: Student, tokens: Sequence[int]) -> Logits:
    with torch.inference_mode():
        logits: Logits = student(torch.tensor([list(tokens)]))[0].numpy()
    return logits


def check(found: Logits, expected: Logits) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


TOKENS = st.integers(0, CONFIG.vocab_size - 1)
PIECES = st.lists(
    st.dictionaries(
        st.integers(0, 4),
        st.tuples(st.lists(TOKENS, min_size=1, max_size=9), st.sampled_from(["last", "all"])),
        min_size=1,
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(steps=PIECES, closings=st.lists(st.integers(0, 4), max_size=8))
def test_ragged_steps_equal_whole_forward_passes(
    artefact: Path, student: Student, steps: list[dict[int, tuple[list[int], str]]], closings: list[int]
) -> None:
    engine = TorchEngine(artefact)
    slots = {sequence: engine.open() for sequence in range(5)}
    seen: dict[int, list[int]] = {sequence: [] for sequence in slots}
    for number, step in enumerate(steps):
        entries = [
            StepEntry(slots[who], tokens, "all" if want == "all" else "last") for who, (tokens, want) in step.items()
        ]
        results = engine.step(entries)
        for (who, (tokens, want)), result in zip(step.items(), results, strict=True):
            seen[who] += tokens
            expected = reference(student, seen[who])
            check(result, expected[-1] if want == "last" else expected[-len(tokens) :])
        if number < len(closings):
            who = closings[number]
            engine.close(slots[who])
            slots[who], seen[who] = engine.open(), []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_computes_what_its_twin_computes(tmp_path: Path, precision: str) -> None:
    tensors = {name: tensor.numpy() for name, tensor in Student.random(CONFIG, seed=1).state_dict().items()}
    path = tmp_path / "weights"
    write_variant(path, tensors, CONFIG, next(p for p in PRECISIONS if p == precision))
    engine = TorchEngine(path)
    tokens = list(range(20))
    check(engine.step([StepEntry(engine.open(), tokens, "all")])[0], reference(load_student(path), tokens))
    assert (engine.precision, engine.name, engine.config) == (precision, "torch", CONFIG)


def test_many_single_tokens_with_holes_between_their_slots(artefact: Path, student: Student) -> None:
    engine = TorchEngine(artefact)
    slots = [engine.open() for _ in range(6)]
    prompts = [[n + 1] * (3 * n + 2) for n in range(6)]
    engine.step([StepEntry(slot, prompt) for slot, prompt in zip(slots, prompts, strict=True)])
    chosen = [5, 0, 3]
    results = engine.step([StepEntry(slots[n], [7]) for n in chosen])
    for n, result in zip(chosen, results, strict=True):
        check(result, reference(student, [*prompts[n], 7])[-1])


def test_embedding_is_the_mean_of_the_hidden_states_and_touches_no_slot(artefact: Path, student: Student) -> None:
    engine = TorchEngine(artefact)
    slot = engine.open()
    engine.step([StepEntry(slot, [1, 2])])
    found = engine.embed([5, 6, 7])
    with torch.inference_mode():
        expected = student.hidden(torch.tensor([[5, 6, 7]]))[0].mean(0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    check(engine.step([StepEntry(slot, [3])])[0], reference(student, [1, 2, 3])[-1])


def test_no_entries_are_no_step(artefact: Path) -> None:
    assert TorchEngine(artefact).step([]) == []


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([StepEntry(9, [1])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [1]), StepEntry(0, [2])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [61])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [-1])], Reason.INVALID_REQUEST),
        ([StepEntry(1, [1]), StepEntry(0, [1] * 95)], Reason.CONTEXT_TOO_LONG),
    ],
)
def test_a_refused_step_changes_nothing(
    artefact: Path, student: Student, entries: list[StepEntry], reason: Reason
) -> None:
    engine = TorchEngine(artefact)
    assert [engine.open(), engine.open()] == [0, 1]
    engine.step([StepEntry(0, [1, 2]), StepEntry(1, [3])])
    with pytest.raises(EbbflowError) as caught:
        engine.step(entries)
    assert caught.value.reason is reason
    results = engine.step([StepEntry(0, [4]), StepEntry(1, [5])])
    check(results[0], reference(student, [1, 2, 4])[-1])
    check(results[1], reference(student, [3, 5])[-1])


def test_the_context_can_be_filled_to_the_last_token(artefact: Path, student: Student) -> None:
    engine = TorchEngine(artefact, context_tokens=70)
    slot = engine.open()
    engine.step([StepEntry(slot, [1] * 60)])
    check(engine.step([StepEntry(slot, [2] * 10)])[0], reference(student, [1] * 60 + [2] * 10)[-1])
    with pytest.raises(EbbflowError) as caught:
        engine.step([StepEntry(slot, [3])])
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    assert TorchEngine(artefact, context_tokens=1000).context_tokens == 96


def test_weights_above_the_memory_limit_are_not_loaded(artefact: Path) -> None:
    with pytest.raises(EbbflowError) as caught:
        TorchEngine(artefact, memory_limit_bytes=WEIGHTS_BYTES - 1)
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_a_cache_above_the_memory_limit_is_refused_and_the_others_go_on(artefact: Path, student: Student) -> None:
    token_bytes = 2 * (CONFIG.num_hidden_layers + 1) * CONFIG.key_width * 4
    engine = TorchEngine(artefact, memory_limit_bytes=WEIGHTS_BYTES + 2 * 20 * token_bytes)
    first, second, third = engine.open(), engine.open(), engine.open()
    engine.step([StepEntry(first, [1] * 18), StepEntry(second, [2])])
    for entry in (StepEntry(third, [3]), StepEntry(second, [2] * 20)):
        with pytest.raises(EbbflowError) as caught:
            engine.step([entry])
        assert caught.value.reason is Reason.OUT_OF_MEMORY
    check(engine.step([StepEntry(first, [4])])[0], reference(student, [1] * 18 + [4])[-1])


def test_a_closed_slot_is_forgotten_and_given_out_again(artefact: Path, student: Student) -> None:
    engine = TorchEngine(artefact)
    first, second = engine.open(), engine.open()
    engine.step([StepEntry(first, [1, 2, 3]), StepEntry(second, [9])])
    engine.close(first)
    with pytest.raises(EbbflowError, match="not open"):
        engine.close(first)
    assert engine.open() == first
    check(engine.step([StepEntry(first, [4])])[0], reference(student, [4])[-1])
    engine.close(first)
    engine.close(second)
    assert engine.open() == 0
