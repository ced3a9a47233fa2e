"""The training loop: student, live teacher, data by number, and nothing that a resumed run would miss."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ebbflow.cloud.distillation.losses import IGNORE, LossSum, Objective, TeacherRows, align, distillation_loss
from ebbflow.cloud.distillation.mixture import Sequences
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.model import Student

_SMOOTHING = 0.1  # weight of the newest step in the running speed


class LiveTeacher(Protocol):
    """What the trainer needs of a teacher."""

    def rows(self, tokens_BT: Tensor) -> TeacherRows:
        """Reads sequences and returns their logits by flat position b * T + t."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    """Steps done."""
    steps: int
    loss: float
    """Of the last step, in nats per token."""
    kl: float
    """Its divergence, in nats per token."""
    cross_entropy: float
    """Its cross-entropy, in nats per token."""
    tokens_per_second: float
    eta_s: float
    """Time that the rest should take, in seconds."""


class Trainer:
    """One run. `step` moves from 0 to `recipe.steps`; with the state of any step it continues exactly.

    Sequence numbers follow from the step alone, and the loss of a step is divided by the tokens of all its
    micro-batches, so neither a restart nor `gradient_accumulation` changes what is learned.
    """

    def __init__(
        self,
        student: Student,
        sequences: Sequences,
        recipe: Recipe,
        teacher: LiveTeacher | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares a run at step 0.

        Args:
            student: float32 weights; they are trained in place.
            sequences: as many as the recipe needs.
            recipe: how to train.
            teacher: none trains on cross-entropy alone.
            clock: seconds, for the speed.
        """
        self.step = 0
        self.student = student
        self._sequences = sequences
        self._recipe = recipe
        self._teacher = teacher
        self._objective = Objective(recipe.kl_weight, recipe.temperature)
        self._optimiser = _optimiser(student, recipe)
        self._clock = clock
        self._step_s: float | None = None

    def run(self, on_step: Callable[[Progress], None]) -> None:
        """Trains to the end, telling of every step; what `on_step` raises stops the run after that step."""
        while self.step < self._recipe.steps:
            on_step(self.advance())

    def advance(self) -> Progress:
        """Takes one step.

        Raises:
            EbbflowError: TRAINING_DIVERGED if the loss or the gradient is no longer finite.
        """
        begin = self._clock()
        sums = self._gradients()
        loss = float(sums.loss) / max(1, sums.token_count)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._recipe.clip_norm, foreach=True)
        if not (torch.isfinite(norm) and torch.isfinite(sums.loss)):
            message = f"loss or gradient of step {self.step} is not finite; lower the learning rate"
            raise EbbflowError(Reason.TRAINING_DIVERGED, message, step=self.step)
        for group in self._optimiser.param_groups:
            group["lr"] = self._recipe.schedule.rate(self.step)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return self._progress(sums, loss, self._clock() - begin)

    def state(self) -> dict[str, Any]:
        """Returns everything that later steps depend on, for `torch.save`."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            Exception: of any type, if the state belongs to another student or recipe.
        """
        self.student.load_state_dict(state["student"])
        self._optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]

    def _gradients(self) -> LossSum:
        """Leaves the gradient of the step's mean loss in the parameters; returns its sums."""
        first = self.step * self._recipe.batch_size
        tokens, ignored = self._sequences.batch(first, self._recipe.batch_size)
        inputs_BT, labels_BT = align(torch.from_numpy(tokens), torch.from_numpy(ignored))
        token_count = int((labels_BT != IGNORE).sum())
        micro_size = -(-len(inputs_BT) // self._recipe.gradient_accumulation)
        loss, kl, cross_entropy = torch.zeros(3, dtype=torch.float64)
        for micro_BT, micro_labels_BT in zip(inputs_BT.split(micro_size), labels_BT.split(micro_size), strict=True):  # type: ignore[no-untyped-call]
            sums = self._forward(micro_BT, micro_labels_BT)
            (sums.loss / max(1, token_count)).backward()  # type: ignore[no-untyped-call]
            loss, kl, cross_entropy = loss + sums.loss.detach(), kl + sums.kl, cross_entropy + sums.cross_entropy
        return LossSum(loss, kl, cross_entropy, token_count)

    def _forward(self, inputs_BT: Tensor, labels_BT: Tensor) -> LossSum:
        rows = self._teacher.rows(inputs_BT) if self._teacher is not None and self._recipe.kl_weight > 0 else None
        with torch.autocast("cpu", torch.bfloat16, enabled=self._recipe.precision == "bfloat16"):
            hidden_BTC = self.student.hidden(inputs_BT)
            if self._recipe.precision == "bfloat16":
                hidden_BTC = hidden_BTC.bfloat16()
        head_VC = self.student.head_weight
        return distillation_loss(hidden_BTC.flatten(0, 1), head_VC, labels_BT.flatten(), self._objective, rows)

    def _progress(self, sums: LossSum, loss: float, step_s: float) -> Progress:
        before = self._step_s
        self._step_s = step_s if before is None else before + _SMOOTHING * (step_s - before)
        tokens = self._recipe.batch_size * self._recipe.sequence_length
        count = max(1, sums.token_count)
        return Progress(
            step=self.step,
            steps=self._recipe.steps,
            loss=loss,
            kl=float(sums.kl) / count,
            cross_entropy=float(sums.cross_entropy) / count,
            tokens_per_second=tokens / max(self._step_s, 1e-9),
            eta_s=self._step_s * (self._recipe.steps - self.step),
        )


def _optimiser(student: Student, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the betas usual for language models; one kernel for all parameters."""
    matrices = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in student.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
