"""What the demo runs with. One place, because the figures of README and report hold for these numbers only."""

from ebbflow.api.v1.distillation_pb2 import Recipe
from ebbflow.api.v1.student_pb2 import Architecture

STUDENT = "docs"
"""Id of the student."""
AGENTS = 3
USERS = 60
"""Users of each agent."""

EPSILON = 4.0
DELTA = 1e-6
ROUNDS_PER_WINDOW = 4

TEACHER_STEPS = 420
ANSWER_TOKENS = 12

SHAPE = Architecture(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rope_theta=10_000.0,
)


def first_recipe(seed: int) -> Recipe:
    """How the first student is trained, on every topic alike."""
    return Recipe(steps=300, batch_size=4, sequence_length=64, learning_rate=3e-3, kl_weight=0.7, seed=seed)


def next_recipe(seed: int) -> Recipe:
    """How it is trained further: the same for the run with feedback, its control and the run without privacy."""
    return Recipe(steps=600, batch_size=4, sequence_length=64, learning_rate=2e-3, kl_weight=0.7, seed=seed + 100)
