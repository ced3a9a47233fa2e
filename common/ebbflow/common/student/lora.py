"""Low-rank changes of a student's linear layers, of which only one of the two matrices is trained.

A layer W [outputs, inputs] computes W·x + B·(A·x). A [rank, inputs] holds signs over sqrt(inputs), from a public seed:
everybody makes the same, to the last bit, and lengths are kept on average (Achlioptas, 2003). B [outputs, rank] begins
at zero and is all that is trained, so that the sum of changes is the change of the sum (FFA-LoRA: Sun et al., ICLR
2024; LoRA: Hu et al., arXiv 2106.09685).

B is a plain `nn.Linear`, for which Opacus knows the gradients of single sequences.
"""

import hashlib
import math
from collections.abc import Collection
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ebbflow.common.privacy.adapters import Slot, slots
from ebbflow.common.student.model import Student


def signs(seed: int, name: str, rank: int, inputs: int) -> Tensor:
    """Returns a layer's matrix A, float32 [rank, inputs]: signs by SHAKE-256 of seed and name, over sqrt(inputs)."""
    count = rank * inputs
    data = hashlib.shake_256(f"ebbflow lora {seed} {name}".encode()).digest((count + 7) // 8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count)
    ones_RI = torch.from_numpy(bits.astype(np.float32)).view(rank, inputs) * 2 - 1
    return ones_RI / math.sqrt(inputs)


class LoraLinear(nn.Module):
    """A linear layer and its change. The layer itself and A are frozen."""

    def __init__(self, base: nn.Linear, down_RI: Tensor) -> None:
        """Wraps a layer; `down_RI` is A."""
        super().__init__()
        rank, inputs = down_RI.shape
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(inputs, rank, bias=False).requires_grad_(False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.down.weight.copy_(down_RI)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the changed layer computes, [..., outputs]."""
        output: Tensor = self.base(x) + self.up(self.down(x))
        return output


class Adapter:
    """The trained values of a student's adapter, as one vector."""

    def __init__(self, student: Student, modules: Collection[str], rank: int, seed: int) -> None:
        """Freezes a student and puts an adapter of zeros around some of its layers.

        Args:
            student: changed in place: it computes with the adapter from now on.
            modules: the layers, by the last part of their names.
            rank: inner width of the change.
            seed: of the matrices A.
        """
        student.requires_grad_(False)
        self.slots = slots(student.config, modules, rank)
        self.dimension = max((slot.end for slot in self.slots), default=0)
        self.parameters: list[nn.Parameter] = []
        with torch.no_grad():
            for slot in self.slots:
                layer = LoraLinear(_layer(student, slot), signs(seed, slot.name, rank, slot.inputs))
                parent, _, last = slot.name.rpartition(".")
                setattr(student.get_submodule(parent), last, layer)
                self.parameters.append(cast("nn.Parameter", layer.up.weight))

    def values(self) -> Tensor:
        """Returns a copy of the trained values, float32 [dimension]."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters]).clone()

    def reset(self) -> None:
        """Sets all values to zero: the student computes as without an adapter."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.zero_()


def _layer(student: Student, slot: Slot) -> nn.Linear:
    return cast("nn.Linear", student.get_submodule(slot.name))


@torch.no_grad()
def merge(student: Student, values_D: Tensor, modules: Collection[str], rank: int, seed: int) -> None:
    """Adds a change to the weights of a student, in place; it then computes what the adapter computed.

    Args:
        student: without an adapter.
        values_D: values of an adapter, float32 [dimension].
        modules: the layers, as they were trained.
        rank: likewise.
        seed: likewise.
    """
    for slot in slots(student.config, modules, rank):
        up_OR = values_D[slot.begin : slot.end].view(slot.outputs, rank)
        weight_OI = _layer(student, slot).weight
        weight_OI += (up_OR @ signs(seed, slot.name, rank, slot.inputs)).to(weight_OI.dtype)
