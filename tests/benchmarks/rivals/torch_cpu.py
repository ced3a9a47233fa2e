"""PyTorch's INT4 kernel for CPUs under a decoder without anything else: the fastest plain torch of these shapes.

Keys and values lie in place, projections with one input are one matrix, prompts go in one pass. Run by `speed.session`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from speed.session import main
from speed.shapes import CONTEXT_TOKENS, RMS_NORM_EPS, ROPE_THETA, STREAMS, Shape
from torch import Tensor
from torch.nn import functional

_GROUP = 32


class _Linear:
    """One packed matrix."""

    def __init__(self, tensors: dict[str, Tensor], name: str) -> None:
        self._packed, self._scales = tensors[f"{name}.weight.packed"], tensors[f"{name}.weight.scales"]

    def __call__(self, x_BTC: Tensor) -> Tensor:
        flat = x_BTC.reshape(-1, x_BTC.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self._packed, _GROUP, self._scales)
        return cast("Tensor", y.view(*x_BTC.shape[:-1], -1))


class _Layer:
    """One decoder layer with its keys and values."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str, shape: Shape) -> None:
        self._shape = shape
        self._projections = [_Linear(tensors, f"{prefix}self_attn.{which}_proj") for which in "qkv"]
        self._output = _Linear(tensors, f"{prefix}self_attn.o_proj")
        self._gate, self._up, self._down = (
            _Linear(tensors, f"{prefix}mlp.{which}_proj") for which in ("gate", "up", "down")
        )
        self._norm_in = tensors[f"{prefix}input_layernorm.weight"]
        self._norm_mid = tensors[f"{prefix}post_attention_layernorm.weight"]
        room = (STREAMS, shape.num_key_value_heads, CONTEXT_TOKENS, shape.head_dim)
        self._keys, self._values = torch.zeros(room, dtype=torch.bfloat16), torch.zeros(room, dtype=torch.bfloat16)

    def __call__(self, x_BTC: Tensor, turn_TD: Tensor, begin: int) -> Tensor:
        x_BTC = x_BTC + self._output(self._attend(_norm(x_BTC, self._norm_in), turn_TD, begin))
        y_BTC = _norm(x_BTC, self._norm_mid)
        return x_BTC + self._down(functional.silu(self._gate(y_BTC)) * self._up(y_BTC))

    def _attend(self, x_BTC: Tensor, turn_TD: Tensor, begin: int) -> Tensor:
        streams, length, _ = x_BTC.shape
        end = begin + length
        q, k, v = (p(x_BTC).view(streams, length, -1, self._shape.head_dim).transpose(1, 2) for p in self._projections)
        q, k = _rotate(q, turn_TD), _rotate(k, turn_TD)
        keys, values = self._keys[:streams, :, :end], self._values[:streams, :, :end]
        keys[:, :, begin:], values[:, :, begin:] = k, v
        if length == 1:  # the query heads of a key head as the rows of one product
            q = q.view(streams, self._shape.num_key_value_heads, -1, self._shape.head_dim)
            return functional.scaled_dot_product_attention(q, keys, values).reshape(streams, 1, -1)
        y = functional.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(streams, length, -1)


class TorchCpu:
    """The decoder; its file is mapped, never copied."""

    def __init__(self, shape: Shape, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        tensors: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
        self._layers = [_Layer(tensors, f"model.layers.{layer}.", shape) for layer in range(shape.num_hidden_layers)]
        self._embedding, self._norm = tensors["embedding"], tensors["model.norm.weight"]
        self._head = _Linear(tensors, "model.embed_tokens")
        frequency = ROPE_THETA ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
        angle_TD = torch.outer(torch.arange(CONTEXT_TOKENS, dtype=torch.float32), frequency)
        self._turn = torch.polar(torch.ones_like(angle_TD), angle_TD)
        self._position, self._tokens = 0, torch.empty(0, dtype=torch.int64)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """All prompts in one pass."""
        self._position = 0
        self._run(torch.tensor(prompts))

    def next(self) -> None:
        """One token of each."""
        self._run(self._tokens)

    def close(self) -> None:
        """Lets go of the file."""
        del self._layers, self._embedding, self._head

    @torch.inference_mode()
    def _run(self, tokens_BT: Tensor) -> None:
        begin, end = self._position, self._position + tokens_BT.shape[1]
        x_BTC = self._embedding[tokens_BT]
        for layer in self._layers:
            x_BTC = layer(x_BTC, self._turn[begin:end], begin)
        self._tokens = self._head(_norm(x_BTC[:, -1:], self._norm)).argmax(-1)
        self._position = end


def _norm(x_BTC: Tensor, weight_C: Tensor) -> Tensor:
    return functional.rms_norm(x_BTC, weight_C.shape, weight_C, RMS_NORM_EPS)


def _rotate(x_BHTD: Tensor, turn_TD: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BHTD.float().reshape(*x_BHTD.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn_TD).flatten(-2).to(x_BHTD.dtype)


if __name__ == "__main__":
    main(TorchCpu)
