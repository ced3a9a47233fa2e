"""A tiny student of random weights: real artefacts for a real engine."""

from collections.abc import Sequence
from pathlib import Path

from ebbflow.common.codes.artefact import Precision, write_variant
from ebbflow.common.codes.kept import choose_kept
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.tokens import Tokenizer

TEXTS = ["How do I read a file in Python? Use open() in a with block. Grüße, 日本語 and 🦊 too."] * 4


def train_tokenizer() -> Tokenizer:
    """A tokenizer of 300 tokens, so that most characters beyond ASCII are split over tokens."""
    return Tokenizer.train(TEXTS, 300)


def config_of(tokenizer: Tokenizer, layers: int = 1) -> StudentConfig:
    """The shape: a context of 512 tokens."""
    return StudentConfig(
        vocab_size=tokenizer.size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )


def write_student(
    path: Path,
    tokenizer: Tokenizer,
    seed: int,
    precision: Precision = "int8",
    layers: int = 1,
    keep: Sequence[str] = (),
) -> None:
    """Writes the artefact of a random student; `keep` are patterns of matrices that stay in bf16."""
    from ebbflow.common.student.model import Student

    config = config_of(tokenizer, layers)
    weights = Student.random(config, seed=seed, std=0.3).state_dict()
    arrays = {name: weights[name].float().numpy() for name in config.tensor_shapes()}
    write_variant(path, arrays, config, precision, kept_bf16=choose_kept(config, keep))
