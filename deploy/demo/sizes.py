"""What the demo runs with. One place, because the figures of README and report hold for these numbers only."""

from dataclasses import dataclass

STUDENT = "docs"
"""Id of the student."""
AGENTS = 3
USERS = 60
"""Users of each agent."""

EPSILON = 4.0
DELTA = 1e-6
ROUNDS_PER_WINDOW = 4

TEACHER_STEPS = 400
FIRST_STEPS = 300
NEXT_STEPS = 600
BATCH = 4
SEQUENCE = 64
FIRST_LEARNING_RATE = 3e-3
NEXT_LEARNING_RATE = 2e-3
KL_WEIGHT = 0.7
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Shape:
    """Shape of the student, in the words of Hugging Face configurations."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
