"""Training on private texts by DP-SGD (Abadi et al., 2016; arXiv 1607.00133), with Opacus' per-sample gradients.

What comes out depends on the texts through clipped and noised sums alone. Their number is private too: rate, steps and
the divisor of a step are the recipe's, and a step that draws no text adds noise like any other. One text moves the sum
of a step by no more than `clip_norm`, because its loss is its own mean and no other text's tokens reach it.

Shapes: B texts of one step, M of them side by side, T positions, C width, V vocabulary.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional

from ebbflow.cloud.distillation import private_noise
from ebbflow.cloud.distillation.losses import IGNORE, align
from ebbflow.cloud.distillation.mixture import pad
from ebbflow.cloud.distillation.private_recipe import PrivateRecipe
from ebbflow.cloud.distillation.trainer import Progress
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.adapters import MODULES
from ebbflow.common.student.lora import Adapter, LoraLinear, merge
from ebbflow.common.student.model import RMSNorm, Student

_GRADIENT_BYTES = 512 << 20  # of the per-sample gradients that live at once
_SMOOTHING = 0.1


@register_grad_sampler(RMSNorm)  # type: ignore[untyped-decorator]
def _norm_gradients(layer: RMSNorm, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients of a norm's weight, [M, C]; faster than Opacus' way for unknown modules."""
    wide = activations[0].float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + layer.epsilon)
    return {layer.weight: (normal * backprops).flatten(1, -2).sum(1)}


class TextLoss(nn.Module):
    """A student with its loss, one number for each text.

    A tied head becomes a module of its own, so that Opacus sees both uses of the embedding. One that is not tied must
    not: a module that is found in two places is counted twice.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        if student.config.tie_word_embeddings:
            self.tied_head = nn.Linear(student.config.hidden_size, student.config.vocab_size, bias=False, device="meta")
            self.tied_head.weight = student.model.embed_tokens.weight

    def forward(self, inputs_MT: Tensor, labels_MT: Tensor) -> Tensor:
        """Returns each text's mean cross-entropy in nats per token, [M]; 0 for one without tokens to predict."""
        head = self.tied_head if self.student.config.tie_word_embeddings else self.student.lm_head
        logits_MTV = head(self.student.hidden(inputs_MT))
        losses_MT = functional.cross_entropy(
            logits_MTV.flatten(0, 1), labels_MT.flatten(), ignore_index=IGNORE, reduction="none"
        ).view_as(labels_MT)
        return losses_MT.sum(1) / (labels_MT != IGNORE).sum(1).clamp(min=1)


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with two differences: noise from the operating system, and no text that spoils a step."""

    @property
    def accumulated_iterations(self) -> int:
        """One: however many parts a step's texts come in, its sum is divided by the public batch size."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Clips; a text whose gradient is not finite counts as none.

        Otherwise infinity times a clip factor of zero is no number, and one text undoes the whole step.
        """
        finite = torch.stack([gradient.flatten(1).isfinite().all(1) for gradient in self.grad_samples]).all(0)
        for parameter in self.params:
            parameter.grad_sample[~finite] = 0.0
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Adds fresh noise to the clipped sums; where no text was drawn, to zeros."""
        counts = [parameter.numel() for parameter in self.params]
        noise = private_noise.gaussian(sum(counts), self.noise_multiplier * self.max_grad_norm)
        for parameter, part in zip(self.params, noise.split(counts), strict=True):  # type: ignore[no-untyped-call]
            summed = torch.zeros_like(parameter) if parameter.summed_grad is None else parameter.summed_grad
            parameter.grad = summed + part.view_as(parameter).to(parameter.dtype)
            parameter.summed_grad = None


class PrivateTrainer:
    """One run of DP-SGD. `step` moves from 0 to `recipe.steps`.

    A checkpoint holds noised weights and moments and no randomness: a run that goes on draws new texts and new noise,
    so no noise is ever added to two sums. What was trained after the checkpoint is lost and was never released; the
    published weights have seen `recipe.steps` noised steps, which is what is accounted.

    Progress tells nothing of the texts: neither loss nor the number of texts in a step.
    """

    def __init__(
        self,
        student: Student,
        documents: Sequence[Sequence[int]],
        recipe: PrivateRecipe,
        noise_multiplier: float,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares a run at step 0.

        Args:
            student: float32 weights; they are trained in place.
            documents: tokens of each text, of any number; longer ones than the recipe's are cut.
            recipe: how to train.
            noise_multiplier: standard deviation of the noise over the clipping norm, from `private_accounting`.
            seed: public; of the frozen matrices of a low-rank change, and of nothing else.
            clock: seconds, for the speed.
        """
        self.step = 0
        self.student = student.train()
        longest = recipe.sequence_length + 1
        self._documents = [document[:longest] for document in documents if len(document) > 1]
        self._recipe = recipe
        self._clock = clock
        self._step_s: float | None = None
        self._begin_id = student.config.bos_token_id
        self._seed = seed
        self._adapter = Adapter(student, MODULES, recipe.rank, seed) if recipe.rank else None
        self._module = GradSampleModule(TextLoss(student), batch_first=True, loss_reduction="sum")
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._side_by_side = max(1, _GRADIENT_BYTES // (4 * sum(parameter.numel() for parameter in trained)))
        self._optimiser = PrivateOptimizer(
            torch.optim.Adam(trained, lr=recipe.learning_rate),
            noise_multiplier=noise_multiplier,
            max_grad_norm=recipe.clip_norm,
            expected_batch_size=recipe.batch_size,
            loss_reduction="mean",
        )

    def run(self, on_step: Callable[[Progress], None]) -> None:
        """Trains to the end, telling of every step; what `on_step` raises stops the run after that step."""
        while self.step < self._recipe.steps:
            on_step(self.advance())

    def advance(self) -> Progress:
        """Takes one step.

        Raises:
            EbbflowError: TRAINING_DIVERGED if the weights are no longer finite.
        """
        begin = self._clock()
        self._noise_gradient()
        self._optimiser.original_optimizer.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self._check()
        return self._progress(self._clock() - begin)

    def state(self) -> dict[str, Any]:
        """Returns everything that later steps depend on, for `torch.save`; no randomness."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, with new randomness.

        Raises:
            Exception: of any type, if the state belongs to another student or recipe.
        """
        self.student.load_state_dict(state["student"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def finish(self) -> None:
        """Leaves an ordinary student with the trained weights; the trainer is used up."""
        self._module.to_standard_module()
        if self._adapter is not None:
            self._merge(self._adapter)

    def _merge(self, adapter: Adapter) -> None:
        """Takes the adapter off the student and adds it to the weights instead."""
        for slot in adapter.slots:
            parent, _, last = slot.name.rpartition(".")
            changed = cast("LoraLinear", self.student.get_submodule(slot.name))
            setattr(self.student.get_submodule(parent), last, changed.base)
        merge(self.student, adapter.values(), MODULES, self._recipe.rank, self._seed)
        self.student.requires_grad_(True)

    def _noise_gradient(self) -> None:
        """Draws texts and leaves the noised sum of their clipped gradients, over the public batch size, as gradient."""
        recipe = self._recipe
        drawn = private_noise.poisson_sample(len(self._documents), recipe.batch_size, recipe.corpus_size)
        for start in range(0, len(drawn), self._side_by_side):
            self._add([self._documents[number] for number in drawn[start : start + self._side_by_side]])
        self._optimiser.add_noise()
        self._optimiser.scale_grad()

    def _add(self, documents: Sequence[Sequence[int]]) -> None:
        """Adds the clipped gradients of some texts to the step's sums."""
        tokens, ignored = pad(documents, self._begin_id, 0)
        inputs_MT, labels_MT = align(torch.from_numpy(tokens), torch.from_numpy(ignored))
        losses_M = self._module(inputs_MT, labels_MT)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Full backward hook is firing"
            )  # tokens have no gradient, as it should be
            losses_M.sum().backward()
        self._optimiser.clip_and_accumulate()
        for parameter in self._optimiser.params:
            parameter.grad_sample = None

    def _check(self) -> None:
        if not all(parameter.isfinite().all() for parameter in self._optimiser.params):
            message = f"a weight is no longer finite after private step {self.step}; lower the learning rate"
            raise EbbflowError(Reason.TRAINING_DIVERGED, message, step=self.step)

    def _progress(self, step_s: float) -> Progress:
        before = self._step_s
        self._step_s = step_s if before is None else before + _SMOOTHING * (step_s - before)
        expected_tokens = self._recipe.batch_size * self._recipe.sequence_length
        return Progress(
            step=self.step,
            steps=self._recipe.steps,
            loss=0.0,
            kl=0.0,
            cross_entropy=0.0,
            tokens_per_second=expected_tokens / max(self._step_s, 1e-9),
            eta_s=self._step_s * (self._recipe.steps - self.step),
        )
