import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch

from ebbflow.cloud.distillation import corpus
from ebbflow.cloud.distillation.checkpoint import Checkpoints
from ebbflow.cloud.distillation.mixture import Documents, Sequences
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.cloud.distillation.trainer import Progress, Trainer
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student

CONFIG = StudentConfig(
    vocab_size=tiny_models.VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
RECIPE = Recipe(steps=8, batch_size=4, sequence_length=24, learning_rate=3e-3, warmup_steps=2, kl_weight=0.7, seed=3)
MakeTrainer = Callable[..., Trainer]


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory: pytest.TempPathFactory) -> MakeTrainer:
    teacher = Teacher.load(str(tiny_models.save_moe_teacher(tmp_path_factory.mktemp("teacher"))), "float32")
    texts = corpus.parse(tiny_models.corpus_lines()).split("train")
    documents = Documents.encode(texts, teacher.tokenizer)

    def make(recipe: Recipe = RECIPE, teacher: Teacher | None = teacher) -> Trainer:
        sequences = Sequences(documents, {}, length=recipe.sequence_length, count=recipe.sequences, seed=recipe.seed)
        return Trainer(Student.random(CONFIG, recipe.seed), sequences, recipe, teacher)

    return make


def _weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.student.parameters()]


def _ignore(_: Progress) -> None:
    pass


@pytest.mark.parametrize("stop_after", range(1, 8))
def test_a_run_that_was_killed_and_resumed_ends_bit_for_bit_like_one_that_was_not(
    stop_after: int, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    whole = make_trainer()
    whole.run(_ignore)
    killed = make_trainer()
    for _ in range(stop_after):
        killed.advance()
    Checkpoints(tmp_path, "run").save(killed.state())
    killed.advance()  # lost with the process
    state = Checkpoints(tmp_path, "run").load()
    assert state is not None
    resumed = make_trainer()
    resumed.load_state(state)
    resumed.run(_ignore)
    assert resumed.step == whole.step == RECIPE.steps
    assert all(torch.equal(a, b) for a, b in zip(_weights(resumed), _weights(whole), strict=True))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_gradient_accumulation_learns_what_one_big_batch_learns(parts: int, make_trainer: MakeTrainer) -> None:
    whole, split = make_trainer(), make_trainer(replace(RECIPE, gradient_accumulation=parts))
    first, second = whole.advance(), split.advance()
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    for a, b in zip(_weights(whole), _weights(split), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_divergence_from_the_teacher_falls(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(replace(RECIPE, steps=60, kl_weight=1.0, learning_rate=1e-2))
    reports: list[Progress] = []
    trainer.run(reports.append)
    assert reports[-1].kl < 0.8 * reports[0].kl
    assert reports[-1].loss == pytest.approx(reports[-1].kl, rel=1e-5)


def test_progress_counts_steps_and_foresees_the_end(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    ticks = itertools.count(0.0, 0.5)
    trainer._clock = lambda: next(ticks)
    reports: list[Progress] = []
    trainer.run(reports.append)
    assert [report.step for report in reports] == list(range(1, 9))
    assert reports[0].tokens_per_second == pytest.approx(4 * 24 / 0.5)
    assert [report.eta_s for report in reports[:2]] == [pytest.approx(3.5), pytest.approx(3.0)]
    assert reports[-1].eta_s == 0
    expected = 0.7 * reports[0].kl + 0.3 * reports[0].cross_entropy
    assert reports[0].loss == pytest.approx(expected, rel=1e-5)


def test_without_a_teacher_cross_entropy_falls(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(replace(RECIPE, steps=30, learning_rate=1e-2), teacher=None)
    reports: list[Progress] = []
    trainer.run(reports.append)
    assert reports[-1].loss < 0.7 * reports[0].loss


def test_bfloat16_products_train_float32_weights(make_trainer: MakeTrainer) -> None:
    wide, narrow = make_trainer(), make_trainer(replace(RECIPE, precision="bfloat16"))
    losses = [(wide.advance().loss, narrow.advance().loss) for _ in range(4)]
    assert all(a == pytest.approx(b, rel=0.02) for a, b in losses)
    assert all(parameter.dtype == torch.float32 for parameter in narrow.student.parameters())


def test_what_the_listener_raises_stops_the_run_after_the_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise EbbflowError(Reason.LEASE_LOST, "lost")

    with pytest.raises(EbbflowError):
        trainer.run(stop)
    assert trainer.step == 3


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_weights(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.student.model.norm.weight[0] = torch.inf
    before = _weights(trainer)
    with pytest.raises(EbbflowError) as caught:
        trainer.advance()
    assert caught.value.reason is Reason.TRAINING_DIVERGED
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))
