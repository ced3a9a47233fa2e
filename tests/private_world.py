"""A tiny student that is trained privately, for tests that need many steps of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebbflow.cloud.distillation.losses import align
from ebbflow.cloud.distillation.mixture import pad
from ebbflow.cloud.distillation.private_recipe import PrivateRecipe
from ebbflow.cloud.distillation.private_training import PrivateTrainer, TextLoss
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student

CONFIG = StudentConfig(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=32,
)
Documents = Sequence[Sequence[int]]


def recipe(**changes: Any) -> PrivateRecipe:
    """Every text in every step, unless a change says otherwise."""
    settings: dict[str, Any] = {
        "epsilon": 8.0,
        "steps": 4,
        "batch_size": 8,
        "corpus_size": 8,
        "learning_rate": 0.05,
        "sequence_length": 12,
    }
    return PrivateRecipe(**{**settings, **changes})


def student(seed: int = 0, std: float = 0.3, **shape: Any) -> Student:
    """Random weights."""
    return Student.random(StudentConfig(**{**vars(CONFIG), **shape}), seed, std)


def trainer(documents: Documents, noise: float = 1.0, of: Student | None = None, **changes: Any) -> PrivateTrainer:
    """A trainer at step 0."""
    return PrivateTrainer(of or student(), documents, recipe(**changes), noise)


def texts(count: int, seed: int = 0, least: int = 2, most: int = 13) -> list[Sequence[int]]:
    """Documents of random tokens and lengths; token 1 begins them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(least, most + 1, (count,), generator=generator).tolist()
    return [
        [1, *torch.randint(3, CONFIG.vocab_size, (length - 1,), generator=generator).tolist()] for length in lengths
    ]


def losses(of: Student, documents: Documents) -> Tensor:
    """Mean loss of each text, as training sees it."""
    tokens, ignored = pad(documents, of.config.bos_token_id, 0)
    inputs_MT, labels_MT = align(torch.from_numpy(tokens), torch.from_numpy(ignored))
    result: Tensor = TextLoss(of)(inputs_MT, labels_MT)
    return result


def noised_gradient(of: PrivateTrainer) -> Tensor:
    """One step's noised gradient of all trained values, without taking the step."""
    of._noise_gradient()
    gradient = torch.cat([parameter.grad.flatten() for parameter in of._optimiser.params])
    of._optimiser.zero_grad(set_to_none=True)
    return gradient
