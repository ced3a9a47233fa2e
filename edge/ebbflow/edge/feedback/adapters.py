"""Trains what each user would change of the student: one small adapter a user, from that user's texts alone.

It needs the extra "edge-torch" and is imported only where a round of adapter updates is answered.

Who is protected is a user, so one user's texts may shape that user's change in any way; the clip at its end bounds it.
What must hold all the same is that no user's change depends on another user's texts, and that nothing but the changes
does depend on anybody's texts. Five traps of training with gradients of single sequences, and what is done:

- A loss that is averaged over the tokens of the whole batch makes one sequence's gradient depend on its neighbours'
  lengths: here each sequence has its own mean, and the batch is their sum.
- Opacus' engine takes sampling rate and divisor from the size of the data: here steps, size and divisor of a batch are
  the plan's. Sequences are drawn with replacement, so that every user costs the same time and who wrote little is heard
  as loudly; Poisson draws would buy nothing, for nothing is amplified where the clip at the end is what protects.
- A batch may be empty, on which models fail: where a user has no text of two tokens, every step is one of nothing.
- With tied weights the gradients of single sequences are not those of the sum: here the embedding is frozen.
- Hooks that were set too early leave an adapter that never moves: here every training begins with one on public tokens,
  which must move it.
"""

import secrets
from collections.abc import Callable, Sequence

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.nn import functional

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import adapters
from ebbflow.common.privacy.vector import AdapterContribution
from ebbflow.common.student.lora import Adapter
from ebbflow.common.student.model import Student

Tokens = Sequence[int]


class Trainer:
    """Trains adapters around one student, one user after the other.

    Args:
        student: weights of the release that the plan takes; changed in place, and of no other use afterwards.
        plan: the round's adapter plan.
        check: called before each step; what it raises ends the training.

    Raises:
        EbbflowError: PLAN_INVALID if the plan does not fit the student; INTERNAL if training does not move the adapter.
    """

    def __init__(self, student: Student, plan: pb.AdapterPlan, check: Callable[[], None] = lambda: None) -> None:
        adapters.check_fits(plan, student.config)
        self._plan, self._student, self._check = plan, student, check
        self._adapter = Adapter(student, plan.modules, plan.rank, plan.seed)
        student.train()  # Opacus' hooks look away otherwise
        # All else is frozen; without this the first adapter's hook has no gradient of its input to wait for, and warns.
        student.model.embed_tokens.register_forward_hook(lambda _module, _input, output: output.requires_grad_())
        GradSampleHooks(student, batch_first=True, loss_reduction="sum")
        self._check_moves()

    def change(self, sequences: Sequence[Tokens]) -> AdapterContribution:
        """Returns one user's change, clipped and in whole steps.

        Args:
            sequences: tokens of the user's texts; what is longer than the plan's sequences is cut.
        """
        plan = self._plan
        usable = [list(tokens[: plan.sequence_length]) for tokens in sequences if len(tokens) > 1]
        self._train(usable)
        return adapters.quantise(self._adapter.values().tolist(), plan.clip_norm, plan.scale)

    def _train(self, sequences: list[list[int]]) -> None:
        """Descends from zero for the plan's number of steps, each on draws of the user's sequences.

        Each sequence's gradient is cut to what, repeated at every step, moves the adapter by `clip_norm`: so no single
        text has more than its share of the user's change.
        """
        plan = self._plan
        self._adapter.reset()
        optimizer = DPOptimizer(
            torch.optim.SGD(self._adapter.parameters, lr=plan.learning_rate),
            noise_multiplier=0.0,  # the noise is made of whole numbers, at the end, once for all users
            max_grad_norm=plan.clip_norm / (plan.steps * plan.learning_rate),
            expected_batch_size=plan.batch_size,
            loss_reduction="mean",
        )
        for _ in range(plan.steps):
            self._check()
            optimizer.zero_grad()
            if sequences:
                batch = [secrets.choice(sequences) for _ in range(plan.batch_size)]
                torch.autograd.backward(sequence_losses(self._student, batch).sum())
            else:
                for parameter in self._adapter.parameters:
                    parameter.grad_sample = torch.zeros(0, *parameter.shape)  # type: ignore[attr-defined]
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _check_moves(self) -> None:
        """Trains on tokens that everybody knows; what does not move is a bug, and no user's matter."""
        length, size = min(8, self._plan.sequence_length), self._student.config.vocab_size
        self._train([[(7 * begin + at) % size for at in range(length)] for begin in range(self._plan.batch_size)])
        if not bool(self._adapter.values().abs().max() > 0):
            raise EbbflowError(Reason.INTERNAL, "training on public tokens does not move the adapter")


def sequence_losses(student: Student, sequences: Sequence[Tokens]) -> Tensor:
    """Returns the mean loss in nats per predicted token of each sequence, float32 [B].

    Each is what the sequence alone would give: neither the padding nor the other sequences play a part.

    Args:
        student: what to measure.
        sequences: tokens, two at least in each.
    """
    longest = max(map(len, sequences))
    tokens_BT = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, tokens in enumerate(sequences):
        tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
    counts_B = torch.tensor([len(tokens) - 1 for tokens in sequences])
    logits_BTV = student(tokens_BT[:, :-1])
    losses_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none")
    counted_BT = torch.arange(longest - 1) < counts_B[:, None]
    return (losses_BT * counted_BT).sum(1) / counts_B
