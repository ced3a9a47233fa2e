"""A run in two parts, one after the other: the recipe's own steps, then private training."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ebbflow.cloud.distillation.trainer import Progress, Trainer
from ebbflow.common.student.model import Student

if TYPE_CHECKING:
    from ebbflow.cloud.distillation.private_training import PrivateTrainer


class Course:
    """A public trainer and a private one that follows it, as one run that can be stopped and resumed anywhere.

    Public steps are repeated exactly after a restart, private ones never: see `PrivateTrainer`. The loss that is told
    in the private part is that of the last public step.
    """

    def __init__(
        self,
        public: Trainer,
        begin_private: Callable[[Student], "PrivateTrainer"],
        public_steps: int,
        private_steps: int,
    ) -> None:
        """Prepares a run at step 0.

        Args:
            public: the first part.
            begin_private: makes the second part, which trains the student on.
            public_steps: steps of the first part.
            private_steps: steps of the second.
        """
        self.student = public.student
        self._public: Trainer | None = public
        self._begin_private = begin_private
        self._private: PrivateTrainer | None = None
        self._public_steps, self._steps = public_steps, public_steps + private_steps
        self._loss = 0.0

    @property
    def step(self) -> int:
        """Steps done in both parts."""
        if self._public is not None:
            return self._public.step
        return self._public_steps + self._private.step if self._private is not None else self._steps

    def run(self, on_step: Callable[[Progress], None]) -> None:
        """Trains to the end, telling of every step; what `on_step` raises stops the run after that step."""
        if self._public is not None:
            self._public.run(lambda progress: self._tell_public(progress, on_step))
            self._go_private()
        if self._private is not None:
            self._private.run(lambda progress: self._tell_private(progress, on_step))
            self._private.finish()
            self._private = None

    def state(self) -> dict[str, Any]:
        """Returns everything that later steps depend on, for `torch.save`."""
        if self._public is not None:
            return {"public": self._public.state()}
        if self._private is not None:
            return {"private": self._private.state()}
        return {"done": self.student.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            Exception: of any type, if the state belongs to another student or recipe.
        """
        if self._public is not None and "public" in state:
            self._public.load_state(state["public"])
        elif "private" in state:
            self._go_private().load_state(state["private"])
        else:
            self._public, self._private = None, None
            self.student.load_state_dict(state["done"])

    def _go_private(self) -> "PrivateTrainer":
        """Ends the public part, whose optimiser's memory is free from now on."""
        self._public = None
        self._private = self._begin_private(self.student)
        return self._private

    def _tell_public(self, progress: Progress, on_step: Callable[[Progress], None]) -> None:
        self._loss = progress.loss
        on_step(replace(progress, steps=self._steps))

    def _tell_private(self, progress: Progress, on_step: Callable[[Progress], None]) -> None:
        on_step(replace(progress, step=self._public_steps + progress.step, steps=self._steps, loss=self._loss))
