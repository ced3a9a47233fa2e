"""Training with gradients of single sequences: the traps, and that one user's change is that user's alone."""

import math
import secrets
from pathlib import Path

import pytest
import tiny_students
import torch
from adapter_world import adapter_plan, config
from opacus.optimizers import DPOptimizer

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import adapters as common
from ebbflow.common.privacy.vector import AdapterContribution
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.lora import Adapter, merge
from ebbflow.common.student.model import Student
from ebbflow.edge.agent import updates
from ebbflow.edge.feedback import adapters
from ebbflow.edge.feedback.adapters import Trainer, sequence_losses

SHORT, LONG = [5, 9, 20, 7], [11, 3, 8, 30, 2, 77, 14, 60, 61, 62]


def student(shape: StudentConfig | None = None) -> Student:
    return Student.random(shape or config(), seed=3, std=0.2)


def plan(**more: object) -> pb.AdapterPlan:
    return adapter_plan(config(), **{"steps": 3, "batch_size": 2, **more})  # type: ignore[arg-type]


def test_users_are_trained_on_one_thread_however_many_the_engines_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the load, which the number of threads follows, would move the last bits of every user's change."""
    seen: list[int] = []
    change = Trainer.change

    def look(self: Trainer, sequences: list[list[int]]) -> AdapterContribution:
        seen.append(torch.get_num_threads())
        return change(self, sequences)

    monkeypatch.setattr(Trainer, "change", look)
    tiny_students.write_student(tmp_path / "weights", tiny_students.train_tokenizer(), seed=3, layers=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = updates._train(tmp_path / "weights", plan(), [{"i1": SHORT, "i2": LONG}, {"i3": SHORT}])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]
    assert [each.made_of for each in found] == [frozenset({"i1", "i2"}), frozenset({"i3"})]


def norm(change: AdapterContribution) -> float:
    return math.sqrt(sum(value * value for value in change.values))


def untied() -> StudentConfig:
    return StudentConfig(**{**vars(config()), "tie_word_embeddings": False})


def test_a_sequence_s_loss_is_what_it_is_alone() -> None:
    model = student()
    with torch.no_grad():
        together = sequence_losses(model, [SHORT, LONG, SHORT])
        alone = torch.cat([sequence_losses(model, [tokens]) for tokens in (SHORT, LONG, SHORT)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("shape", [config(), untied()], ids=["tied", "untied"])
def test_gradients_of_single_sequences_are_those_of_each_alone(
    shape: StudentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands beside a sequence in its batch, and however long that is."""
    seen: list[list[torch.Tensor]] = []

    def look(self: DPOptimizer) -> None:
        seen.append([sample.clone() for sample in self.grad_samples])
        original(self)

    original = DPOptimizer.clip_and_accumulate
    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", look)
    draws = iter([SHORT, LONG])
    trainer = Trainer(student(shape), plan(steps=1))
    monkeypatch.setattr(secrets, "choice", lambda _: next(draws))
    seen.clear()
    trainer.change([SHORT, LONG])
    for row, tokens in enumerate((SHORT, LONG)):
        model = student(shape)
        adapter = Adapter(model, trainer._plan.modules, trainer._plan.rank, trainer._plan.seed)
        torch.autograd.backward(sequence_losses(model, [tokens]).sum())
        for parameter, samples in zip(adapter.parameters, seen[0], strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(samples[row], parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_whole_change_is_within_the_clip_norm_before_it_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []

    def look(change: list[float], clip_norm: float, scale: int) -> AdapterContribution:
        found.append(math.hypot(*change) / clip_norm)
        return AdapterContribution((0,) * len(change))

    trainer = Trainer(student(), plan(clip_norm=0.01, learning_rate=50.0))
    monkeypatch.setattr(common, "quantise", look)
    trainer.change([SHORT, LONG])
    assert 0.1 < found[0] < 1.001


def test_a_change_is_at_most_as_long_as_the_scale() -> None:
    wild = plan(clip_norm=1e-3, learning_rate=100.0, batch_size=1)
    found = norm(Trainer(student(), wild).change([LONG]))
    assert 0.5 * wild.scale < found <= wild.scale


def test_every_user_costs_the_same_number_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and batch size are public: neither the time nor the divisor tells how much a user wrote."""
    rows: list[int] = []

    def count(model: Student, sequences: list[list[int]]) -> torch.Tensor:
        rows.append(len(sequences))
        return sequence_losses(model, sequences)

    trainer = Trainer(student(), plan(steps=3, batch_size=4))
    monkeypatch.setattr(adapters, "sequence_losses", count)
    for texts in ([SHORT], [SHORT, LONG] * 40):
        rows.clear()
        trainer.change(texts)
        assert rows == [4, 4, 4]


def test_who_repeats_a_text_a_hundred_times_changes_what_who_wrote_it_once_does() -> None:
    trainer = Trainer(student(), plan())
    assert trainer.change([SHORT] * 100) == trainer.change([SHORT])


def test_a_user_s_change_does_not_depend_on_who_was_trained_before() -> None:
    trainer = Trainer(student(), plan())
    first = trainer.change([SHORT])
    trainer.change([LONG])
    trainer.change([])
    assert trainer.change([SHORT]) == first
    assert norm(first) > 0


@pytest.mark.parametrize("texts", [[], [[]], [[7]], [[7], []]])
def test_a_user_without_a_text_of_two_tokens_changes_nothing(texts: list[list[int]]) -> None:
    assert norm(Trainer(student(), plan()).change(texts)) == 0


def test_text_beyond_the_plan_s_sequences_is_not_looked_at() -> None:
    trainer = Trainer(student(), plan(sequence_length=4))
    assert trainer.change([SHORT]) == trainer.change([SHORT + LONG * 50])


def test_a_change_lowers_the_loss_on_what_it_was_trained_on() -> None:
    eager = plan(steps=8, batch_size=1, clip_norm=3.0)
    change = Trainer(student(), eager).change([LONG])
    changed = student()
    values = torch.tensor(change.values, dtype=torch.float32) * eager.clip_norm / eager.scale
    merge(changed, values, eager.modules, eager.rank, eager.seed)
    with torch.no_grad():
        before, after = (float(sequence_losses(model, [LONG])) for model in (student(), changed))
    assert after < before - 0.5


def test_the_student_s_own_weights_stay_as_they_are() -> None:
    model = student()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(model, plan()).change([SHORT, LONG])
    after = model.state_dict()
    for name, tensor in before.items():
        found = after.get(name, after.get(name.replace(".weight", ".base.weight")))
        assert found is not None
        assert torch.equal(found, tensor), name


def test_an_adapter_that_does_not_move_is_noticed_before_any_user_s_text_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The silent failure of hooks that were set too early: the loss is computed, and nothing moves."""
    monkeypatch.setattr(DPOptimizer, "step", lambda self: None)
    with pytest.raises(EbbflowError) as caught:
        Trainer(student(), plan())
    assert caught.value.reason is Reason.INTERNAL


def test_a_plan_for_another_student_is_refused() -> None:
    other = plan()
    other.dimension += 4
    with pytest.raises(EbbflowError) as caught:
        Trainer(student(), other)
    assert caught.value.reason is Reason.PLAN_INVALID
