"""The torch twin of an artefact: a student that computes what engines compute, in float32.

Engines multiply integers: beside the weights, the inputs of every coded matrix are INT8 codes in groups of 32, made on
the fly; the inputs of every other matrix are rounded to bfloat16, and so are keys and values when they are kept. The
twin does the same roundings, so that the losses that the gate signs are those that devices compute.

Every rounding here passes its gradient straight through (Bengio et al., arXiv 1308.3432), so that a student can be
trained while it feels them: `quantisation_aware` makes such a student, whose weights are rounded on the fly too.

Letters of shapes: O outputs, I inputs, G = I/32 groups; others as in `ebbflow.common.student.model`.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ebbflow.common.codes import quantise
from ebbflow.common.codes.artefact import KVKind, Precision, Variant, read_variant
from ebbflow.common.codes.derive import offered_by, weight_as
from ebbflow.common.codes.kept import coded_matrices
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Memory, Nothing, Student

_MOST = float(quantise.INT8_MOST)
# 127 divided by less than this is infinite; such a group is nothing.
_LEAST = 1e-36


class Twin(Student):
    """A student that rounds what engines round.

    Args:
        config: shape of the student.
        precision: of the matrices that can be coded.
        kv_cache: how keys and values are kept.
        kept_bf16: matrices that are not coded all the same.
        rounds_weights: whether weights are rounded in every pass, for training; otherwise they are loaded rounded.
    """

    def __init__(
        self,
        config: StudentConfig,
        precision: Precision,
        kv_cache: KVKind = "bf16",
        kept_bf16: Collection[str] = (),
        *,
        rounds_weights: bool = False,
    ) -> None:
        super().__init__(config)
        self.precision: Precision = precision
        self.kv_cache: KVKind = kv_cache
        self.rounds_weights = rounds_weights
        coded = coded_matrices(config, kept_bf16) if precision != "bf16" else frozenset()
        for name, module in self.named_modules():
            if type(module) is nn.Linear:
                is_coded = f"{name}.weight" in coded
                module.forward = _Projection(self, module, is_coded)  # type: ignore[method-assign, assignment]
        embedding = self.model.embed_tokens
        is_coded = "model.embed_tokens.weight" in coded
        embedding.forward = _Lookup(self, embedding, is_coded)  # type: ignore[method-assign, assignment]
        self._head_is_coded = is_coded if config.tie_word_embeddings else "lm_head.weight" in coded

    def hidden(self, tokens_BT: Tensor, memory: Memory | None = None) -> Tensor:
        """Returns the last hidden state, [B, T, C]: what the head multiplies, not yet rounded for it."""
        return super().hidden(tokens_BT, RoundedMemory(memory if memory is not None else Nothing(), self.kv_cache))

    def logits(self, hidden_BTC: Tensor) -> Tensor:
        """Applies the head to hidden states of any leading shape: [..., V]."""
        return self.multiply(hidden_BTC, self.head_weight, None, self._head_is_coded)

    def multiply(self, x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None, is_coded: bool) -> Tensor:
        """Multiplies vectors of any leading shape with a matrix as engines do: [..., O]."""
        x_I = round_activations(x_I) if is_coded else round_bf16(x_I)
        return functional.linear(x_I, self.rounded(weight_OI, is_coded), bias_O)

    def rounded(self, weight_OI: Tensor, is_coded: bool) -> Tensor:
        """Returns what an artefact would keep of some rows of a matrix."""
        if not self.rounds_weights:
            return weight_OI
        return round_weight(weight_OI, self.precision) if is_coded else round_bf16(weight_OI)


class _Projection:
    """The forward pass of a linear layer of a twin."""

    def __init__(self, twin: Twin, linear: nn.Linear, is_coded: bool) -> None:
        self._twin, self._linear, self._is_coded = twin, linear, is_coded

    def __call__(self, x_I: Tensor) -> Tensor:
        return self._twin.multiply(x_I, self._linear.weight, self._linear.bias, self._is_coded)


class _Lookup:
    """The forward pass of a twin's embedding. Rows are coded each on its own, so only those looked up are rounded."""

    def __init__(self, twin: Twin, embedding: nn.Embedding, is_coded: bool) -> None:
        self._twin, self._embedding, self._is_coded = twin, embedding, is_coded

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        rows_NC = functional.embedding(tokens_BT.flatten(), self._embedding.weight)
        return self._twin.rounded(rows_NC, self._is_coded).view(*tokens_BT.shape, -1)


class RoundedMemory:
    """A memory that is given keys and values as they are kept."""

    def __init__(self, memory: Memory, kv_cache: KVKind) -> None:
        self._memory = memory
        self._round = round_bf16 if kv_cache == "bf16" else round_vectors

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Returns the positions of the new tokens."""
        return self._memory.positions(tokens_BT)

    def attend(self, layer: int, query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        """Rounds the new keys and values, then attends."""
        return self._memory.attend(layer, query_BHTD, self._round(key_BKTD), self._round(value_BKTD))

    def advance(self, tokens_BT: Tensor) -> None:
        """Passes on that the new tokens are now old ones."""
        self._memory.advance(tokens_BT)


def load_student(path: Path) -> Twin:
    """Loads an artefact of any precision; the reference for the gate and for every engine.

    Raises:
        EbbflowError: FILE_CORRUPT if the artefact is not whole.
    """
    return build_student(read_variant(path))


def build_student(variant: Variant, precision: Precision | None = None, kv_cache: KVKind = "bf16") -> Twin:
    """De-quantises a variant tensor by tensor into its twin.

    Args:
        variant: an artefact.
        precision: one that the artefact gives; None means its own.
        kv_cache: how keys and values are kept.

    Raises:
        EbbflowError: FILE_CORRUPT if it holds numbers that no code stands for; INVALID_REQUEST if it does not give the
            precision.
    """
    precision = precision or variant.precision
    if precision not in offered_by(variant.precision):
        message = f"an artefact in {variant.precision} does not give {precision!r:.20}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="precision")
    with torch.device("meta"):
        twin = Twin(variant.config, precision, kv_cache, variant.kept_bf16)
    return cast("Twin", _load(twin, variant, precision))


def load_weights(path: Path) -> Student:
    """Loads the weights of an artefact into a plain student, to train on from: nothing else is rounded.

    Raises:
        EbbflowError: FILE_CORRUPT if the artefact is not whole.
    """
    variant = read_variant(path)
    return _load(Student.empty(variant.config), variant, variant.precision)


def quantisation_aware(
    student: Student, precision: Precision, kv_cache: KVKind = "bf16", kept_bf16: Collection[str] = ()
) -> Twin:
    """Returns a twin that shares a student's parameters, for training them to be packed.

    Its logits are those of the artefact that would be written of the parameters as they are.
    """
    with torch.device("meta"):
        twin = Twin(student.config, precision, kv_cache, kept_bf16, rounds_weights=True)
    twin.load_state_dict(student.state_dict(keep_vars=True), assign=True)
    return twin.train(student.training)


def _load(student: Student, variant: Variant, precision: Precision) -> Student:
    tensors = {name: torch.from_numpy(weight_as(variant, name, precision)) for name in variant.config.tensor_shapes()}
    student.load_state_dict(tensors, assign=True)
    return student.requires_grad_(False).eval()


def round_activations(x_I: Tensor) -> Tensor:
    """Rounds to what INT8 codes in groups of 32 stand for; the last dimension is a multiple of 32.

    A group's scale is its largest magnitude through 127, in float32; codes are rounded to the nearest, ties to even.
    """
    return _straight_through(x_I, _round_groups(_in_groups(x_I.detach())).flatten(-2))


def round_vectors(x_D: Tensor) -> Tensor:
    """Rounds to what INT8 codes with one scale for the last dimension stand for."""
    return _straight_through(x_D, _round_groups(x_D.detach()))


def round_bf16(x: Tensor) -> Tensor:
    """Rounds to bfloat16, ties to even, and stays in its own type."""
    return _straight_through(x, x.detach().bfloat16().to(x.dtype))


def round_weight(weight_OI: Tensor, precision: Precision) -> Tensor:
    """Rounds a matrix to what new codes stand for, as `quantise_int8` and `derive_int4` make them."""
    weight_OGI = _in_groups(weight_OI.detach().float())
    most_OG1 = weight_OGI.abs().amax(-1, keepdim=True)
    scale_OG1 = (
        (most_OG1 * (quantise.HEADROOM / quantise.INT8_MOST)).half().float().clamp(max=float(quantise.SCALE_MOST))
    )
    # Among float16's subnormals rounding may leave a scale too small to reach the largest weight.
    step = 2.0**-24
    scale_OG1 = torch.where(scale_OG1 * (quantise.INT8_MOST + 0.5) < most_OG1, scale_OG1 + step, scale_OG1)
    codes_OGI = (weight_OGI / scale_OG1.clamp(min=step)).round().clamp(-_MOST, _MOST)
    if precision == "int4":
        most4 = quantise.INT4_MOST
        magnitude_OGI = ((2 * most4 * codes_OGI.abs() + quantise.INT8_MOST) / (2 * quantise.INT8_MOST)).floor()
        codes_OGI = codes_OGI.sign() * magnitude_OGI
        scale_OG1 = (scale_OG1 * _MOST / most4).half().float()
    return _straight_through(weight_OI, (codes_OGI * scale_OG1).flatten(-2).to(weight_OI.dtype))


def _in_groups(x_I: Tensor) -> Tensor:
    return x_I.reshape(*x_I.shape[:-1], -1, quantise.GROUP)


def _round_groups(x_I: Tensor) -> Tensor:
    wide_I = x_I.float()
    most_1 = wide_I.abs().amax(-1, keepdim=True)
    inverse_1 = torch.where(most_1 > _LEAST, _MOST / most_1, 0.0)
    return ((wide_I * inverse_1).round() * (most_1 / _MOST)).to(x_I.dtype)


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        del ctx, x
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradient, None


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    return cast("Tensor", _StraightThrough.apply(x, rounded))  # type: ignore[no-untyped-call]
