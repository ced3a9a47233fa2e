"""The learning rate by step."""

import math
from dataclasses import dataclass

FLOOR = 0.1
"""Share of the peak at which the cosine ends."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, then a cosine down to a tenth of it. Steps count from 0.

    Attributes:
        peak: highest learning rate.
        steps: steps of the whole run.
        warmup_steps: steps until the peak is reached; at most `steps`.
    """

    peak: float
    steps: int
    warmup_steps: int

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step; the first is above 0, the last is the floor."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        span = max(1, self.steps - 1 - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        return self.peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
