"""The student: a decoder with grouped-query attention, interleaved rotary embedding and gated feed-forward layers.

It computes what transformers' `Ernie4_5ForCausalLM` computes, and its parameters carry the same names.

Letters of shapes: B sequences, T new tokens, S tokens attended to, H query heads, K key heads, D width of a head,
C width of the residual stream, V vocabulary.
"""

from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig


class Memory(Protocol):
    """What the attention of all layers looks back on, and where the new tokens stand."""

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Returns the positions of the new tokens, [T] or [B, T]."""

    def attend(self, layer: int, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        """Takes the new keys and values of a layer and returns its attention, of `query_BHTD`'s shape."""

    def advance(self, tokens_BT: Tensor) -> None:
        """Is told at the end of a forward pass that the new tokens are now old ones."""


class Nothing:
    """No memory: the new tokens are the whole sequences. Padding on the right changes nothing on its left."""

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Counts from 0."""
        return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)

    def attend(self, layer: int, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        """Attends causally."""
        del layer
        return functional.scaled_dot_product_attention(
            query_BHTD, key_BKTD, value_BKTD, is_causal=True, enable_gqa=True
        )

    def advance(self, tokens_BT: Tensor) -> None:
        """Forgets them."""


class KVCache:
    """Keys and values of sequences that grow together.

    Args:
        config: shape of the student.
        batch: number of sequences.
        capacity_tokens: longest that they may grow.
        dtype: that of the student's weights.
        device: that of the student's weights.
    """

    def __init__(
        self,
        config: StudentConfig,
        batch: int,
        capacity_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity_tokens, config.head_dim)
        self.length = 0
        self._keys_LBKSD = torch.zeros(shape, dtype=dtype, device=device)
        self._values_LBKSD = torch.zeros(shape, dtype=dtype, device=device)

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Counts on from the tokens that are kept.

        Raises:
            EbbflowError: CONTEXT_TOO_LONG if the new tokens do not fit.
        """
        end, capacity_tokens = self.length + tokens_BT.shape[1], self._keys_LBKSD.shape[3]
        if end > capacity_tokens:
            raise EbbflowError(Reason.CONTEXT_TOO_LONG, f"{end} tokens do not fit into a cache of {capacity_tokens}")
        return torch.arange(self.length, end, device=tokens_BT.device)

    def attend(self, layer: int, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        """Keeps the new keys and values and attends to all of them."""
        end = self.length + key_BKTD.shape[2]
        self._keys_LBKSD[layer, :, :, self.length : end] = key_BKTD
        self._values_LBKSD[layer, :, :, self.length : end] = value_BKTD
        return attend_causally(query_BHTD, self._keys_LBKSD[layer, :, :, :end], self._values_LBKSD[layer, :, :, :end])

    def advance(self, tokens_BT: Tensor) -> None:
        """Counts the new tokens as kept."""
        self.length += tokens_BT.shape[1]


def attend_causally(query_BHTD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor) -> Tensor:
    """Attention of the last T of S tokens to those before and themselves."""
    new, total = query_BHTD.shape[2], keys_BKSD.shape[2]
    mask_TS = None
    if 1 < new < total:
        mask_TS = torch.ones(new, total, dtype=torch.bool, device=query_BHTD.device).tril(total - new)
    return functional.scaled_dot_product_attention(
        query_BHTD, keys_BKSD, values_BKSD, attn_mask=mask_TS, is_causal=1 < new == total, enable_gqa=True
    )


def rotation(config: StudentConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cosine and sine by which a token at each position turns its pairs: float32 [..., D/2].

    Source: Su et al., RoFormer (arXiv 2104.09864). Pairs are neighbours (0,1), (2,3), ... as in ERNIE and GLM.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    # In this order of operations: far out, another one turns by visibly other angles than transformers does.
    angle = positions[..., None].float() * (1.0 / config.rope_theta**exponent)
    return angle.cos(), angle.sin()


def rotate(heads_BHTD: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns every pair of neighbours in every head, in float32."""
    even, odd = heads_BHTD.float().view(*heads_BHTD.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1)
    return turned.flatten(-2).type_as(heads_BHTD)


class RMSNorm(nn.Module):
    """Scales each vector to unit root mean square, in float32, then each component by a weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` normalised over its last dimension."""
        # Written out: on CPU the backward pass of functional.rms_norm takes twice as long.
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention of one layer."""

    def __init__(self, config: StudentConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.query_width, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.key_width, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.key_width, bias=config.use_bias)
        self.o_proj = nn.Linear(config.query_width, config.hidden_size, bias=config.use_bias)

    def forward(self, x_BTC: Tensor, cosine: Tensor, sine: Tensor, memory: Memory) -> Tensor:
        """Returns what the layer adds to the residual stream, [B, T, C]."""
        query_BHTD, key_BKTD, value_BKTD = (
            projection(x_BTC).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query_BHTD, key_BKTD = rotate(query_BHTD, cosine, sine), rotate(key_BKTD, cosine, sine)
        mixed_BHTD = memory.attend(self.layer, query_BHTD, key_BKTD, value_BKTD)
        output: Tensor = self.o_proj(mixed_BHTD.transpose(1, 2).flatten(-2))
        return output


class FeedForward(nn.Module):
    """The gated feed-forward part of one layer."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Returns what the layer adds to the residual stream, [B, T, C]."""
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))
        return output


class Layer(nn.Module):
    """Attention, then the feed-forward part, each on the normalised residual stream."""

    def __init__(self, config: StudentConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BTC: Tensor, cosine: Tensor, sine: Tensor, memory: Memory) -> Tensor:
        """Returns the residual stream behind this layer, [B, T, C]."""
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), cosine, sine, memory)
        output: Tensor = x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))
        return output


class Decoder(nn.Module):
    """Everything below the output head."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_BT: Tensor, memory: Memory) -> Tensor:
        """Returns the last hidden state, normalised, [B, T, C]."""
        positions = memory.positions(tokens_BT)
        if positions.dim() > 1:
            positions = positions[:, None]
        cosine, sine = rotation(self.config, positions)
        x_BTC: Tensor = self.embed_tokens(tokens_BT)
        for layer in self.layers:
            x_BTC = layer(x_BTC, cosine, sine, memory)
        memory.advance(tokens_BT)
        output: Tensor = self.norm(x_BTC)
        return output


class Student(nn.Module):
    """A decoder with its output head.

    Built directly, its weights are whatever torch puts there; `Student.random` and `load_checkpoint` fill them.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def random(cls, config: StudentConfig, seed: int, std: float = 0.02) -> Self:
        """Builds a student of random weights: the same on every machine for the same seed.

        Matrices are normal with `std`, norms 1, biases 0, as transformers begins ERNIE-4.5.
        """
        student = cls.empty(config).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, std, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        return student

    @classmethod
    def empty(cls, config: StudentConfig) -> Self:
        """Builds a student on the meta device, to load weights into with `assign=True`."""
        with torch.device("meta"):
            return cls(config)

    @property
    def head_weight(self) -> Tensor:
        """The output head, which is the embedding where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(self, tokens_BT: Tensor, memory: Memory | None = None) -> Tensor:
        """Returns the last hidden state, [B, T, C]: what the head multiplies."""
        output: Tensor = self.model(tokens_BT, memory if memory is not None else Nothing())
        return output

    def logits(self, hidden_BTC: Tensor) -> Tensor:
        """Applies the head to hidden states of any leading shape: [..., V]."""
        return functional.linear(hidden_BTC, self.head_weight)

    def forward(self, tokens_BT: Tensor, cache: Memory | None = None) -> Tensor:
        """Returns logits of the next token behind each of the new ones, [B, T, V].

        Args:
            tokens_BT: new tokens, int64.
            cache: what came before; None if these are whole sequences.
        """
        return self.logits(self.hidden(tokens_BT, cache))
