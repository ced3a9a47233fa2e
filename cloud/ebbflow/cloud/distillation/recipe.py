"""How to train, read from the registry's JSON and checked."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf import json_format

from ebbflow.api.v1 import distillation_pb2
from ebbflow.cloud.distillation.schedule import Schedule
from ebbflow.common.codes.kept import MOST_PATTERN_CHARACTERS, MOST_PATTERNS
from ebbflow.common.errors import EbbflowError, Reason

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run's settings; what they mean is said in distillation.proto.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field that cannot be.
    """

    steps: int
    batch_size: int
    sequence_length: int
    gradient_accumulation: int = 1
    learning_rate: float
    warmup_steps: int = 0
    kl_weight: float = 0.9
    temperature: float = 1.0
    seed: int = 0
    precision: Precision = "float32"
    """Of the products; master weights, sums and the optimiser's state are float32 either way."""
    weight_decay: float = 0.01
    """Of matrices; norms and biases have none."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    keep_bf16: tuple[str, ...] = ()
    """Patterns of the matrices that every precision of the release keeps in bf16."""

    def __post_init__(self) -> None:
        for field in ("batch_size", "sequence_length"):
            _check(getattr(self, field) >= 1, field, "at least 1")
        _check(self.steps >= 0, "steps", "at least 0")
        _check(1 <= self.gradient_accumulation <= self.batch_size, "gradient_accumulation", "1 to batch_size")
        _check(0 <= self.warmup_steps <= self.steps, "warmup_steps", "0 to steps")
        _check(math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 1, "learning_rate", "above 0, at most 1")
        _check(0 <= self.kl_weight <= 1, "kl_weight", "0 to 1")
        longest = max(map(len, self.keep_bf16), default=1)
        _check(len(self.keep_bf16) <= MOST_PATTERNS, "keep_bf16", f"at most {MOST_PATTERNS} patterns")
        wanted = f"patterns of 1 to {MOST_PATTERN_CHARACTERS} characters"
        _check(all(self.keep_bf16) and longest <= MOST_PATTERN_CHARACTERS, "keep_bf16", wanted)
        _check(0.01 <= self.temperature <= 100, "temperature", "0.01 to 100")  # noqa: PLR2004 - said in the message

    @property
    def schedule(self) -> Schedule:
        """The learning rate by step."""
        return Schedule(self.learning_rate, self.steps, self.warmup_steps)

    @property
    def sequences(self) -> int:
        """Sequences of the whole run."""
        return self.steps * self.batch_size

    @classmethod
    def from_json(cls, value: dict[str, Any], precision: Precision = "float32", *, least_steps: int = 1) -> "Recipe":
        """Reads the proto JSON of a `Recipe` message and fills in what 0 stands for.

        Args:
            value: the JSON.
            precision: of the products.
            least_steps: 0 where something else than the recipe changes the weights.

        Raises:
            EbbflowError: INVALID_REQUEST naming the field that cannot be.
        """
        try:
            message = json_format.ParseDict(value, distillation_pb2.Recipe())
        except json_format.ParseError as error:
            raise EbbflowError(Reason.INVALID_REQUEST, "recipe is not a Recipe", field="recipe") from error
        _check(message.steps >= least_steps, "steps", f"at least {least_steps}")
        return cls(
            steps=message.steps,
            batch_size=message.batch_size,
            sequence_length=message.sequence_length,
            gradient_accumulation=message.gradient_accumulation or 1,
            learning_rate=message.learning_rate,
            warmup_steps=message.warmup_steps or message.steps // 20,
            kl_weight=message.kl_weight,
            temperature=message.temperature or 1.0,
            seed=message.seed,
            precision=precision,
            keep_bf16=tuple(message.keep_bf16),
        )


def _check(possible: bool, field: str, wanted: str) -> None:
    if not possible:
        raise EbbflowError(Reason.INVALID_REQUEST, f"recipe.{field} must be {wanted}", field=f"recipe.{field}")
