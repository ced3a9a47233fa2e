"""The student as an ONNX graph of plain operations, with the names of inputs and outputs that runtimes know.

Letters of shapes: B sequences, T new tokens, S tokens that are seen, H query heads, K key heads, D width of a head.
"""

from typing import Protocol

import numpy as np
from onnx import TensorProto

from ebbflow.common.export.onnx_graph import Graph
from ebbflow.common.student.config import StudentConfig

_HIDDEN = float(np.finfo(np.float32).min)
"""Added to the score of a key that may not be seen. Not infinite, so that a row of padding stays a number."""


class Matrices(Protocol):
    """How the student's matrices are kept and multiplied."""

    def embed(self, graph: Graph, token_ids: str) -> str:
        """Returns rows of the embedding for ids [B, T]: [B, T, C]."""

    def linear(self, graph: Graph, x: str, name: str) -> str:
        """Returns x [B, T, I] times the matrix [O, I] of a Hugging Face name, without its bias: [B, T, O]."""

    def vector(self, graph: Graph, name: str) -> str:
        """Returns a norm's weight or a bias, by its Hugging Face name."""


class Decoder:
    """Adds the computation of a student to a graph."""

    def __init__(self, graph: Graph, config: StudentConfig, matrices: Matrices) -> None:
        """Takes the graph, the shape and the weights."""
        self._graph, self._config, self._matrices = graph, config, matrices
        self._cosine = self._sine = self._mask = ""
        self._present: dict[str, str] = {}

    def build(self) -> None:
        """Adds inputs, computation and outputs."""
        graph, config = self._graph, self._config
        ids = graph.input("input_ids", TensorProto.INT64, ("batch", "sequence"))
        mask = graph.input("attention_mask", TensorProto.INT64, ("batch", "total"))
        positions = graph.input("position_ids", TensorProto.INT64, ("batch", "sequence"))
        shape = ("batch", config.num_key_value_heads, "past", config.head_dim)
        past = [
            tuple(graph.input(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape) for part in ("key", "value"))
            for layer in range(config.num_hidden_layers)
        ]
        self._cosine, self._sine = self._rotation(positions)
        self._mask = self._visible(mask, past[0][0], ids)
        x = self._matrices.embed(graph, ids)
        for layer, (key, value) in enumerate(past):
            x = self._layer(layer, x, key, value)
        x = self._norm(x, "model.norm.weight")
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        logits = self._matrices.linear(graph, x, head)
        graph.output(logits, "logits", TensorProto.FLOAT, ("batch", "sequence", config.vocab_size))
        for name, value in self._present.items():
            graph.output(value, name, TensorProto.FLOAT, (*shape[:2], "total", shape[3]))

    def _rotation(self, positions: str) -> tuple[str, str]:
        """Cosine and sine of every pair's angle, [B, T, 1, D/2, 1]."""
        graph, config = self._graph, self._config
        exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        frequency = np.float32(1.0) / np.float32(config.rope_theta) ** exponent
        wide = graph.op("Cast", positions, to=TensorProto.FLOAT)
        wide = graph.op("Unsqueeze", wide, graph.constant([2, 3, 4], np.int64))
        angle = graph.op("Mul", wide, graph.constant(frequency.reshape(1, 1, 1, -1, 1)))
        return graph.op("Cos", angle), graph.op("Sin", angle)

    def _visible(self, mask: str, past_key: str, ids: str) -> str:
        """What is added to scores, [B, 1, T, S]: 0 where a key may be seen, which is never behind the query."""
        graph = self._graph
        zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
        past = graph.op("Gather", graph.op("Shape", past_key), graph.constant(2, np.int64))
        new = graph.op("Gather", graph.op("Shape", ids), one)
        total = graph.op("Add", past, new)
        rows = graph.op("Unsqueeze", graph.op("Range", past, total, one), graph.constant([1], np.int64))
        columns = graph.op("Unsqueeze", graph.op("Range", zero, total, one), graph.constant([0], np.int64))
        behind = graph.op("LessOrEqual", columns, rows)
        given = graph.op("Unsqueeze", graph.op("Cast", mask, to=TensorProto.BOOL), graph.constant([1, 2], np.int64))
        seen = graph.op("And", behind, given)
        return graph.op("Where", seen, graph.constant(0.0), graph.constant(_HIDDEN))

    def _layer(self, layer: int, x: str, past_key: str, past_value: str) -> str:
        graph, prefix = self._graph, f"model.layers.{layer}."
        normed = self._norm(x, prefix + "input_layernorm.weight")
        mixed = self._attend(layer, normed, past_key, past_value)
        x = graph.op("Add", x, self._project(mixed, prefix + "self_attn.o_proj"))
        normed = self._norm(x, prefix + "post_attention_layernorm.weight")
        gate = self._project(normed, prefix + "mlp.gate_proj")
        silu = graph.op("Mul", gate, graph.op("Sigmoid", gate))
        inner = graph.op("Mul", silu, self._project(normed, prefix + "mlp.up_proj"))
        return graph.op("Add", x, self._project(inner, prefix + "mlp.down_proj"))

    def _attend(self, layer: int, x: str, past_key: str, past_value: str) -> str:
        graph, config, prefix = self._graph, self._config, f"model.layers.{layer}.self_attn."
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        query = self._rotate(self._project(x, prefix + "q_proj"), heads)
        new_key = self._rotate(self._project(x, prefix + "k_proj"), kv_heads)
        new_value = self._heads(self._project(x, prefix + "v_proj"), kv_heads)
        key = graph.op("Concat", past_key, new_key, axis=2)
        value = graph.op("Concat", past_value, new_value, axis=2)
        self._present |= {f"present.{layer}.key": key, f"present.{layer}.value": value}
        scaled = graph.op("Mul", query, graph.constant(width**-0.5))
        # The queries that share a key head become rows of one matrix.
        scores = graph.op("MatMul", self._shaped(scaled, 0, kv_heads, -1, width), self._turned(key, 0, 1, 3, 2))
        scores = graph.op("Add", self._shaped(scores, 0, heads, -1, 0), self._mask)
        shares = self._shaped(graph.op("Softmax", scores, axis=-1), 0, kv_heads, -1, 0)
        mixed = self._shaped(graph.op("MatMul", shares, value), 0, heads, -1, width)
        return self._shaped(self._turned(mixed, 0, 2, 1, 3), 0, 0, heads * width)

    def _rotate(self, x: str, heads: int) -> str:
        """Turns neighbouring pairs of [B, T, heads * D]; returns [B, heads, T, D]."""
        graph, width = self._graph, self._config.head_dim
        pairs = self._shaped(x, 0, 0, heads, width // 2, 2)
        even, odd = graph.ops("Split", pairs, outputs=2, axis=-1, num_outputs=2)
        first = graph.op("Sub", graph.op("Mul", even, self._cosine), graph.op("Mul", odd, self._sine))
        second = graph.op("Add", graph.op("Mul", odd, self._cosine), graph.op("Mul", even, self._sine))
        return self._heads(graph.op("Concat", first, second, axis=-1), heads)

    def _heads(self, x: str, heads: int) -> str:
        return self._turned(self._shaped(x, 0, 0, heads, self._config.head_dim), 0, 2, 1, 3)

    def _project(self, x: str, stem: str) -> str:
        output = self._matrices.linear(self._graph, x, f"{stem}.weight")
        if not self._config.use_bias:
            return output
        return self._graph.op("Add", output, self._matrices.vector(self._graph, f"{stem}.bias"))

    def _norm(self, x: str, name: str) -> str:
        graph = self._graph
        square = graph.op("Pow", x, graph.constant(2.0))
        mean = graph.op("ReduceMean", square, graph.constant([-1], np.int64), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(self._config.rms_norm_eps)))
        return graph.op("Mul", graph.op("Div", x, root), self._matrices.vector(graph, name))

    def _shaped(self, x: str, *dimensions: int) -> str:
        """Reshapes; 0 keeps a dimension, -1 takes what is left."""
        return self._graph.op("Reshape", x, self._graph.constant(dimensions, np.int64))

    def _turned(self, x: str, *order: int) -> str:
        return self._graph.op("Transpose", x, perm=list(order))
