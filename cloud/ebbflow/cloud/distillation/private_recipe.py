"""How to train on private texts, read from the registry's JSON and checked.

Imports no torch: the control plane refuses what cannot be before it is queued.
"""

import math
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from ebbflow.api.v1 import distillation_pb2
from ebbflow.common.errors import EbbflowError, Reason

DEFAULT_DELTA = 1e-6
DEFAULT_CLIP_NORM = 1.0
MOST_STEPS = 100_000
MOST_RANK = 256
LEAST_EPSILON, MOST_EPSILON = 0.05, 64.0
LEAST_DELTA = 1e-15


@dataclass(frozen=True, kw_only=True)
class PrivateRecipe:
    """Settings of one run of DP-SGD; what they mean is said in distillation.proto.

    Every one of them is public. None may be worked out from the private texts, their number neither.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field that cannot be.
    """

    epsilon: float
    delta: float = DEFAULT_DELTA
    steps: int
    batch_size: int
    corpus_size: int
    clip_norm: float = DEFAULT_CLIP_NORM
    learning_rate: float
    sequence_length: int
    rank: int = 0

    def __post_init__(self) -> None:
        epsilons = f"between {LEAST_EPSILON:g} and {MOST_EPSILON:g}"
        _check(LEAST_EPSILON <= self.epsilon <= MOST_EPSILON, "epsilon", epsilons)
        _check(1 <= self.steps <= MOST_STEPS, "steps", f"1 to {MOST_STEPS}")
        _check(self.corpus_size >= 1, "corpus_size", "at least 1")
        _check(1 <= self.batch_size <= self.corpus_size, "batch_size", "1 to corpus_size")
        # A mechanism that gives one text in corpus_size away as it is would hold a larger delta.
        deltas = f"at least {LEAST_DELTA:g} and below 1/corpus_size"
        _check(LEAST_DELTA <= self.delta < 1 / self.corpus_size, "delta", deltas)
        _check(math.isfinite(self.clip_norm) and self.clip_norm > 0, "clip_norm", "above 0")
        _check(math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 1, "learning_rate", "above 0, at most 1")
        _check(self.sequence_length >= 1, "sequence_length", "at least 1")
        _check(0 <= self.rank <= MOST_RANK, "rank", f"0 to {MOST_RANK}")

    @property
    def sampling_rate(self) -> float:
        """Probability with which each text is in a step, whatever becomes of the others."""
        return self.batch_size / self.corpus_size

    @classmethod
    def from_json(cls, value: dict[str, Any], sequence_length: int) -> "PrivateRecipe":
        """Reads the proto JSON of a `PrivateTraining` message and fills in what 0 stands for.

        Args:
            value: the JSON.
            sequence_length: of the recipe.

        Raises:
            EbbflowError: INVALID_REQUEST naming the field that cannot be.
        """
        try:
            message = json_format.ParseDict(value, distillation_pb2.PrivateTraining())
        except json_format.ParseError as error:
            words = "private_training is not a PrivateTraining"
            raise EbbflowError(Reason.INVALID_REQUEST, words, field="private_training") from error
        return cls(
            epsilon=message.epsilon,
            delta=message.delta or DEFAULT_DELTA,
            steps=message.steps,
            batch_size=message.batch_size,
            corpus_size=message.corpus_size,
            clip_norm=message.clip_norm or DEFAULT_CLIP_NORM,
            learning_rate=message.learning_rate,
            sequence_length=message.sequence_length or sequence_length,
            rank=message.rank,
        )


def _check(possible: bool, field: str, wanted: str) -> None:
    if not possible:
        name = f"private_training.{field}"
        raise EbbflowError(Reason.INVALID_REQUEST, f"{name} must be {wanted}", field=name)
