import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ebbflow.cloud.distillation.losses import IGNORE, LossSum, Objective, align, distillation_loss

ROWS, WIDTH, VOCABULARY = 23, 8, 37


def _example(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    teacher = 2 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[torch.rand(ROWS, generator=generator) < 0.3] = IGNORE
    return hidden.requires_grad_(), head.requires_grad_(), teacher, labels


def _reference(
    hidden: Tensor, head: Tensor, teacher: Tensor, labels: Tensor, weight: float, temperature: float
) -> Tensor:
    """The definition, row by row, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        if label == IGNORE:
            continue
        logits = hidden[i].double() @ head.double().T
        p = torch.softmax(teacher[i].double() / temperature, 0)
        q = torch.softmax(logits / temperature, 0)
        kl = (p * (p.log() - q.log())).sum()
        total = total + weight * temperature**2 * kl - (1 - weight) * torch.log_softmax(logits, 0)[label]
    return total


def _loss(hidden: Tensor, head: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> LossSum:
    return distillation_loss(hidden, head, labels, objective, lambda rows: teacher[rows])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    weight=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    rows_per_chunk=st.integers(1, ROWS + 3),
)
def test_loss_and_gradients_equal_the_float64_definition_for_any_chunk(
    seed: int, weight: float, temperature: float, rows_per_chunk: int
) -> None:
    hidden, head, teacher, labels = _example(seed)
    objective = Objective(weight, temperature, buffer_bytes=rows_per_chunk * VOCABULARY * 8)
    got = _loss(hidden, head, teacher, labels, objective)
    expected = _reference(hidden, head, teacher, labels, weight, temperature)
    torch.testing.assert_close(got.loss, expected, rtol=1e-11, atol=1e-11)
    assert got.token_count == int((labels != IGNORE).sum())
    if got.token_count:
        got_grads = torch.autograd.grad(got.loss, (hidden, head))
        expected_grads = torch.autograd.grad(expected, (hidden, head))
        torch.testing.assert_close(got_grads, expected_grads, rtol=1e-10, atol=1e-11)


def test_float32_stays_close_to_the_float64_definition() -> None:
    hidden, head, teacher, labels = _example(1, torch.float32)
    got = _loss(hidden, head, teacher, labels, Objective(0.7, 1.0))
    expected = _reference(hidden, head, teacher, labels, 0.7, 1.0)
    torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_keep_float32_sums() -> None:
    hidden, head, teacher, labels = _example(2, torch.float32)
    got = _loss(hidden.bfloat16(), head, teacher, labels, Objective(0.7, 1.0))
    expected = _reference(hidden.bfloat16(), head.bfloat16(), teacher, labels, 0.7, 1.0)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), expected, rtol=2e-2, atol=1e-2)


def test_backward_passes_a_factor_on() -> None:
    hidden, head, teacher, labels = _example(3)
    plain = torch.autograd.grad(_loss(hidden, head, teacher, labels, Objective()).loss, (hidden, head))
    scaled = torch.autograd.grad(_loss(hidden, head, teacher, labels, Objective()).loss / 7, (hidden, head))
    torch.testing.assert_close(scaled, tuple(grad / 7 for grad in plain))


def test_ignored_rows_reach_neither_student_nor_teacher() -> None:
    hidden, head, teacher, labels = _example(4)
    asked: list[int] = []

    def rows(index: Tensor) -> Tensor:
        asked.extend(index.tolist())
        return teacher[index]

    loss = distillation_loss(hidden, head, labels, Objective(), rows).loss
    (grad,) = torch.autograd.grad(loss, (hidden,))
    ignored = labels == IGNORE
    assert set(asked) == set(torch.nonzero(~ignored).squeeze(1).tolist())
    assert torch.count_nonzero(grad[ignored]) == 0
    assert (grad[~ignored].abs().sum(1) > 0).all()


def test_a_batch_of_padding_alone_is_zero_over_zero_tokens() -> None:
    hidden, head, teacher, labels = _example(5)
    got = _loss(hidden, head, teacher, torch.full_like(labels, IGNORE), Objective())
    got.loss.backward()  # type: ignore[no-untyped-call]
    assert (got.loss.item(), got.token_count) == (0.0, 0)


def test_without_a_teacher_it_is_cross_entropy_whatever_the_weight() -> None:
    hidden, head, _, labels = _example(6)
    got = distillation_loss(hidden, head, labels, Objective(kl_weight=0.9))
    expected = functional.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(got.loss, head), torch.autograd.grad(expected, head))


def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient() -> None:
    hidden, head, _, labels = _example(7)
    got = _loss(hidden, head, (hidden @ head.T).detach(), labels, Objective(kl_weight=1.0, temperature=2.0))
    (grad,) = torch.autograd.grad(got.loss, head)
    assert abs(got.loss.item()) < 1e-10
    assert grad.abs().max() < 1e-10


def test_ids_past_the_students_vocabulary_are_cut_off_before_the_teachers_softmax() -> None:
    hidden, head, teacher, labels = _example(8)
    padded = torch.cat([teacher, torch.full((ROWS, 5), 9.0, dtype=teacher.dtype)], 1)
    assert (
        _loss(hidden, head, padded, labels, Objective()).loss == _loss(hidden, head, teacher, labels, Objective()).loss
    )


def test_a_teacher_that_excludes_tokens_gives_no_nan() -> None:
    hidden, head, teacher, labels = _example(9)
    teacher[:, 3] = -torch.inf
    got = _loss(hidden, head, teacher, labels, Objective())
    assert torch.isfinite(got.loss)
    assert torch.isfinite(torch.autograd.grad(got.loss, head)[0]).all()


@pytest.mark.parametrize("cuts", [[23], [5, 18], [1, 2, 20], [10, 10, 3]])
def test_micro_batches_divided_by_the_tokens_of_the_step_equal_one_batch(cuts: list[int]) -> None:
    hidden, head, teacher, labels = _example(10)
    whole = _loss(hidden, head, teacher, labels, Objective())
    (whole_grad,) = torch.autograd.grad(whole.loss / whole.token_count, head)
    total = torch.zeros_like(head)
    for rows in torch.arange(ROWS).split(cuts):  # type: ignore[no-untyped-call]
        part = _loss(hidden[rows], head, teacher[rows], labels[rows], Objective())
        total += torch.autograd.grad(part.loss / whole.token_count, head)[0]
    torch.testing.assert_close(total, whole_grad)


def test_each_position_is_trained_towards_the_token_that_follows_it() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 0]])
    inputs, labels = align(tokens, tokens == 0)
    assert inputs.tolist() == [[5, 6, 7, 8]]
    assert labels.tolist() == [[6, 7, 8, IGNORE]]


def test_a_student_that_predicts_the_next_token_beats_one_that_is_off_by_one() -> None:
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    inputs, labels = align(tokens)
    head = 10 * torch.eye(12)
    following, same, late = (functional.one_hot(ids, 12).float() for ids in (labels, inputs, inputs.roll(1, 1)))
    losses = [distillation_loss(rows[0], head, labels[0], Objective()).loss for rows in (following, same, late)]
    assert losses[0] < 0.01
    assert min(losses[1:]) > 30


def test_the_teachers_row_meets_the_position_that_reads_the_same_token() -> None:
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    _, labels = align(tokens)
    head = 10 * torch.eye(12)
    student = functional.one_hot(labels, 12).float()[0]
    teacher = 10 * functional.one_hot(labels, 12).float()[0]
    right = _loss(student, head, teacher, labels[0], Objective(kl_weight=1.0)).loss
    shifted = _loss(student, head, teacher.roll(1, 0), labels[0], Objective(kl_weight=1.0)).loss
    assert right < 1e-5
    assert shifted > 10


def test_rows_per_chunk_keep_the_buffer_bounded() -> None:
    assert Objective(buffer_bytes=1 << 20).rows_per_chunk(103_424) == 2
    assert Objective(buffer_bytes=1).rows_per_chunk(103_424) == 1
    assert Objective(buffer_bytes=1 << 20).rows_per_chunk(2048) == 128
