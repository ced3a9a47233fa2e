"""What DP-SGD promises of one step, held against loops over single texts, and whether it learns."""

import math
from typing import Any

import private_world
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from private_world import losses, noised_gradient, student, texts, trainer
from torch import Tensor

from ebbflow.cloud.distillation import private_training
from ebbflow.cloud.distillation.private_training import PrivateTrainer
from ebbflow.cloud.distillation.trainer import Progress
from ebbflow.common.errors import EbbflowError, Reason

SHAPES: list[dict[str, Any]] = [{}, {"tie_word_embeddings": False}, {"use_bias": True}]
SILENT = 1e-12


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def _samples(of: PrivateTrainer, documents: private_world.Documents) -> Tensor:
    """Gradients of single texts as Opacus has them, [M, D]."""
    seen: list[Tensor] = []
    clip = DPOptimizer.clip_and_accumulate

    def look(optimiser: DPOptimizer) -> None:
        seen.append(torch.cat([gradient.flatten(1) for gradient in optimiser.grad_samples], 1).clone())
        clip(optimiser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPOptimizer, "clip_and_accumulate", look)
        of._add(documents)
    of._optimiser.zero_grad(set_to_none=True)
    return torch.cat(seen)


def _filled(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _alone(of: PrivateTrainer, documents: private_world.Documents) -> Tensor:
    """The same by autograd, one text after the other."""
    rows = []
    of._module.disable_hooks()
    for document in documents:
        (loss,) = losses(of.student, [document])
        gradients = torch.autograd.grad(loss, of._optimiser.params, allow_unused=True)
        parameters = zip(gradients, of._optimiser.params, strict=True)
        rows.append(torch.cat([_filled(g, p).flatten() for g, p in parameters]))
    of._module.enable_hooks()
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_the_gradient_of_each_text_is_that_of_the_text_alone(shape: dict[str, Any], rank: int) -> None:
    documents = texts(6)
    subject = trainer(documents, of=student(**shape), rank=rank)
    if rank:
        with torch.no_grad():
            for parameter in subject._optimiser.params:
                parameter.normal_(0, 0.1)
    torch.testing.assert_close(_samples(subject, documents), _alone(subject, documents), rtol=1e-4, atol=1e-6)


def test_a_low_rank_run_trains_nothing_but_its_own_matrices() -> None:
    subject = trainer(texts(4), rank=2)
    assert sum(parameter.numel() for parameter in subject._optimiser.params) == 2 * (8 + 4 + 4 + 8 + 16 + 16 + 8)
    assert not subject.student.model.embed_tokens.weight.requires_grad


@settings(deadline=None, max_examples=40)
@given(others=st.integers(0, 6), seed=st.integers(0, 1000), most=st.integers(2, 13))
def test_no_neighbour_changes_the_gradient_of_a_text(others: int, seed: int, most: int) -> None:
    (text,) = texts(1, seed=seed, least=5)
    subject = trainer([])
    together = _samples(subject, [text, *texts(others, seed=seed + 1, most=most)])
    torch.testing.assert_close(together[0], _samples(subject, [text])[0], rtol=1e-3, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(0, 7), clip=st.floats(1e-3, 10), scale=st.sampled_from([1.0, 1e-3, 1e3]), seed=st.integers(0, 99)
)
def test_one_text_moves_the_sum_of_a_step_by_no_more_than_the_clipping_norm(
    count: int, clip: float, scale: float, seed: int
) -> None:
    documents = texts(count + 1, seed=seed)
    subject = trainer(documents[:-1], noise=SILENT, clip_norm=clip)
    with torch.no_grad():
        subject.student.model.norm.weight.mul_(scale)
    without = noised_gradient(subject)
    subject._documents = documents
    moved = float((noised_gradient(subject) - without).norm()) * subject._recipe.batch_size
    assert moved <= clip * (1 + 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_text_whose_gradient_is_no_number_spoils_nothing(value: float) -> None:
    of = student()
    with torch.no_grad():
        of.model.embed_tokens.weight[5] = value
    of.config.__dict__["tie_word_embeddings"] = False
    of.lm_head = torch.nn.Linear(8, 24, bias=False)
    sound = [1, 3, 4, 6, 7]
    subject = trainer([sound], noise=SILENT, of=of)
    expected = noised_gradient(subject)
    subject._documents = [sound, [1, 5, 5, 5]]
    torch.testing.assert_close(noised_gradient(subject), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("side_by_side", [1, 2, 3, 5])
def test_a_step_in_parts_is_a_step_in_one(side_by_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = texts(7)
    whole = noised_gradient(trainer(documents, noise=SILENT))
    values = sum(parameter.numel() for parameter in student().parameters())
    monkeypatch.setattr(private_training, "_GRADIENT_BYTES", 4 * values * side_by_side)
    split = trainer(documents, noise=SILENT)
    assert split._side_by_side == side_by_side
    torch.testing.assert_close(noised_gradient(split), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [0, 20, 31, 32])
def test_noise_and_divisor_do_not_hang_on_the_number_of_texts(count: int) -> None:
    nothing_to_learn = [[3, 1]] * count  # what begins a document is never predicted
    subject = trainer(nothing_to_learn, noise=2.0, clip_norm=3.0, batch_size=10, corpus_size=40)
    noise = torch.cat([noised_gradient(subject) for _ in range(60)])
    deviation = float(noise.std()) / (2.0 * 3.0 / 10)
    assert abs(deviation - 1) < 6 / math.sqrt(2 * len(noise))
    assert abs(float(noise.mean())) < 6 * float(noise.std()) / math.sqrt(len(noise))


def test_a_step_that_draws_no_text_adds_noise_and_counts() -> None:
    subject = trainer([])
    before = [parameter.clone() for parameter in subject._optimiser.params]
    progress = subject.advance()
    assert (progress.step, subject.step) == (1, 1)
    assert all(not torch.equal(a, b) for a, b in zip(before, subject._optimiser.params, strict=True))


def test_texts_without_anything_to_predict_count_for_nothing() -> None:
    empty = noised_gradient(trainer([[1], [], [1]], noise=SILENT))
    assert float(empty.norm()) < 1e-6


def test_longer_texts_are_cut() -> None:
    long, short = [1, *range(3, 20)], [1, *range(3, 15)]
    a, b = (noised_gradient(trainer([text], noise=SILENT, sequence_length=12)) for text in (long, short))
    torch.testing.assert_close(a, b)


def test_progress_tells_neither_loss_nor_how_many_texts_were_drawn() -> None:
    ticks = iter(range(100))
    told: list[list[Progress]] = []
    for documents in ([], texts(20)):
        subject = PrivateTrainer(student(), documents, private_world.recipe(), 1.0, clock=lambda: float(next(ticks)))
        told.append([])
        subject.run(told[-1].append)
    assert told[0] == told[1]
    assert told[0][-1].loss == 0.0
    assert told[0][-1].tokens_per_second == pytest.approx(8 * 12)


def test_weights_that_are_no_longer_finite_end_the_run() -> None:
    subject = trainer(texts(4))
    with torch.no_grad():
        subject._optimiser.params[0][0] = math.inf
    with pytest.raises(EbbflowError) as caught:
        subject.advance()
    assert caught.value.reason is Reason.TRAINING_DIVERGED


@torch.no_grad()
def _loss(of: PrivateTrainer, documents: private_world.Documents) -> float:
    return float(losses(of.student, documents[:1]))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_learns_through_its_noise_and_leaves_an_ordinary_student(rank: int) -> None:
    documents = [[1, *([3, 4, 5, 6] * 3)]] * 64
    subject = trainer(
        documents, noise=0.7, rank=rank, steps=60, batch_size=32, corpus_size=64, learning_rate=0.03, clip_norm=0.5
    )
    names = set(student().state_dict())
    before = _loss(subject, documents)
    subject.run(lambda _: None)
    trained = _loss(subject, documents)
    subject.finish()
    after = _loss(subject, documents)
    assert after == pytest.approx(trained, rel=1e-4)
    assert after < 0.7 * before
    assert set(subject.student.state_dict()) == names
    assert all(
        parameter.requires_grad and not hasattr(parameter, "grad_sample") for parameter in subject.student.parameters()
    )
