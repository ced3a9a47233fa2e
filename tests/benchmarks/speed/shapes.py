"""The students that the engines run. Imported in every engine's own environment: nothing but the standard library."""

from dataclasses import dataclass

CONTEXT_TOKENS = 2048
STREAMS = 8
"""That run together."""


@dataclass(frozen=True)
class Shape:
    """A decoder with tied embeddings, in the words of Hugging Face's configurations."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads together."""
        return self.num_key_value_heads * self.head_dim


SHAPES = {
    "0.3b": Shape("0.3b", 103_424, 1024, 3072, 18, 16, 2, 128),
    "26m": Shape("26m", 6_400, 512, 1408, 8, 8, 2, 64),
}
"""ERNIE-4.5-0.3B's, and a small one where what surrounds the arithmetic counts."""
ROPE_THETA = 500_000.0
RMS_NORM_EPS = 1e-5
