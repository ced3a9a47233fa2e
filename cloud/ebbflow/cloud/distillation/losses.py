"""Forward KL divergence from a teacher plus cross-entropy, over positions, in bounded memory.

Everything here is sum-reduced and says over how many tokens, so that the caller divides once by the tokens of the whole
step: gradient accumulation then equals one big batch. Student and teacher read the same input tokens, so row i of one
belongs to row i of the other; the label of a row is the token that follows it.

The gradient is worked out beside the loss, chunk by chunk (the way of Liger's fused linear losses), from one softmax of
each side. With logits z, student q = softmax(z / T), teacher p, weight w and label y, a row contributes

    loss = w T^2 KL(p || q) + (1 - w) CE(z, y)
    dloss/dz = w T (q - p) + (1 - w) (softmax(z) - onehot(y))

Shapes: N rows (positions), D width, V vocabulary, C rows of one chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""The label of a row that counts for nothing."""

TeacherRows = Callable[[Tensor], Tensor]
"""Teacher's logits [C, at least V] of the rows with these indices [C]; called once for each chunk."""

_MOST_ROWS = 512  # more make no product faster, and fall out of the processor's caches
_LEAST_LOG_PROB = -1e4  # exp() of it is 0, and 0 times it is 0, where -inf would give nan


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how much memory it may take meanwhile.

    Attributes:
        kl_weight: share of the divergence, 0 to 1; cross-entropy has the rest.
        temperature: softmax temperature of the divergence; its gradients are scaled back by the square.
        buffer_bytes: size of one [C, V] buffer in the accumulating precision; at most five live at once.
    """

    kl_weight: float = 0.9
    temperature: float = 1.0
    buffer_bytes: int = 32 << 20

    def rows_per_chunk(self, vocabulary_size: int, element_bytes: int = 4) -> int:
        """Returns C, at least 1."""
        return max(1, min(_MOST_ROWS, self.buffer_bytes // (vocabulary_size * element_bytes)))


class LossSum(NamedTuple):
    """Sums over the rows that count."""

    loss: Tensor
    """Weighted sum in nats; a scalar to differentiate."""
    kl: Tensor
    """Sum of KL(teacher || student) at the temperature, without T^2; 0 without a teacher."""
    cross_entropy: Tensor
    """Sum of cross-entropy."""
    token_count: int
    """Rows that count."""


def align(tokens_BS: Tensor, ignored_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Splits sequences into what is read and what is to be predicted.

    Args:
        tokens_BS: token ids; S is one more than the positions that are trained.
        ignored_BS: True for tokens that are not to be predicted, such as padding.

    Returns:
        inputs [B, S-1] and labels [B, S-1]; labels[:, t] follows inputs[:, t], or is IGNORE.
    """
    labels_BT = tokens_BS[:, 1:]
    if ignored_BS is not None:
        labels_BT = labels_BT.masked_fill(ignored_BS[:, 1:], IGNORE)
    return tokens_BS[:, :-1], labels_BT


def distillation_loss(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, objective: Objective, teacher: TeacherRows | None = None
) -> LossSum:
    """Returns the objective's sums for a student whose logits are `hidden_ND @ head_VD.T`.

    The products run in the precision of `hidden_ND`, softmax and sums in float32 at least. Gradients reach `hidden_ND`
    and `head_VD`; never the teacher. Rows whose label is IGNORE are left out of every product.

    Args:
        hidden_ND: last hidden states.
        head_VD: output embedding.
        labels_N: next tokens, or IGNORE.
        objective: what is minimised.
        teacher: the teacher's logits by row; ids past the student's vocabulary are cut off before its softmax. Without
            one, the loss is cross-entropy alone, whatever the weight.
    """
    rows_K = torch.nonzero(labels_N != IGNORE).squeeze(1)
    wants_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad)
    loss, kl, cross_entropy = _FusedLoss.apply(hidden_ND, head_VD, labels_N, rows_K, objective, teacher, wants_gradient)  # type: ignore[no-untyped-call]
    return LossSum(loss, kl, cross_entropy, rows_K.numel())


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        rows_K: Tensor,
        objective: Objective,
        teacher: TeacherRows | None,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums_dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        head = head_VD.detach().to(hidden_ND.dtype)
        hidden = hidden_ND.detach()
        grad_hidden = torch.zeros_like(hidden) if wants_gradient else None
        grad_head = torch.zeros_like(head, dtype=sums_dtype) if wants_gradient else None
        kl_sum = ce_sum = hidden.new_zeros((), dtype=torch.float64)
        size = objective.rows_per_chunk(len(head), sums_dtype.itemsize)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows_C in rows_K.split(size):  # type: ignore[no-untyped-call]
                hidden_CD = hidden[rows_C]
                logits_CV = (hidden_CD @ head.T).to(sums_dtype)
                teacher_CV = None if teacher is None else teacher(rows_C)[:, : len(head)].to(sums_dtype)
                kl, ce, grad_CV = _chunk(logits_CV, labels_N[rows_C], teacher_CV, objective)
                kl_sum, ce_sum = kl_sum + kl, ce_sum + ce
                if grad_hidden is not None and grad_head is not None:
                    grad_CV = grad_CV.to(hidden.dtype)
                    grad_hidden[rows_C] = grad_CV @ head
                    _accumulate(grad_head, grad_CV, hidden_CD)
        weight = objective.kl_weight if teacher is not None else 0.0
        loss = weight * objective.temperature**2 * kl_sum + (1 - weight) * ce_sum
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_VD.dtype
        kl_sum, ce_sum = kl_sum.to(sums_dtype), ce_sum.to(sums_dtype)
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        return loss.to(sums_dtype), kl_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            (grad_head * scale).to(ctx.head_dtype),
            *(None,) * 5,
        )


def _accumulate(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """Adds grad.T @ hidden to a total of at least the same precision."""
    if total_VD.dtype == grad_CV.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        total_VD += grad_CV.T @ hidden_CD


def _chunk(
    logits_CV: Tensor, labels_C: Tensor, teacher_CV: Tensor | None, objective: Objective
) -> tuple[Tensor | float, Tensor, Tensor]:
    """Returns the sums of divergence and cross-entropy, and the gradient of the objective by logits [C, V].

    `logits_CV` is used up.
    """
    labels_C1 = labels_C.unsqueeze(1)
    if teacher_CV is None:
        log_q_CV = torch.log_softmax(logits_CV, 1)
        ce = -log_q_CV.gather(1, labels_C1).sum(dtype=torch.float64)
        return 0.0, ce, _subtract_at(log_q_CV.exp_(), labels_C1, 1.0)
    weight, temperature = objective.kl_weight, objective.temperature
    log_p_CV = torch.log_softmax(teacher_CV if temperature == 1 else teacher_CV / temperature, 1)
    log_p_CV.clamp_(min=_LEAST_LOG_PROB)
    p_CV = log_p_CV.exp()
    log_q_CV = torch.log_softmax(logits_CV if temperature == 1 else logits_CV / temperature, 1)
    kl = (_dot(p_CV, log_p_CV) - _dot(p_CV, log_q_CV)).double()
    if temperature == 1:
        ce = -log_q_CV.gather(1, labels_C1).sum(dtype=torch.float64)
        grad_CV = log_q_CV.exp_().sub_(p_CV, alpha=weight)
        return kl, ce, _subtract_at(grad_CV, labels_C1, 1 - weight)
    log_s_CV = torch.log_softmax(logits_CV, 1)
    ce = -log_s_CV.gather(1, labels_C1).sum(dtype=torch.float64)
    grad_CV = log_q_CV.exp_().sub_(p_CV).mul_(weight * temperature)
    grad_CV.add_(log_s_CV.exp_(), alpha=1 - weight)
    return kl, ce, _subtract_at(grad_CV, labels_C1, 1 - weight)


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Returns the sum of products without a buffer for them."""
    return torch.dot(a_CV.flatten(), b_CV.flatten())


def _subtract_at(values_CV: Tensor, index_C1: Tensor, amount: float) -> Tensor:
    """Subtracts `amount` at one column of each row, in place."""
    return values_CV.scatter_add_(1, index_C1, values_CV.new_full(index_C1.shape, -amount))
