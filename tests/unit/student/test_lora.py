"""Adapters: made alike everywhere, nothing until trained, and the same when merged."""

import hashlib

import pytest
import torch
from adapter_world import config

from ebbflow.common.privacy.adapters import slots
from ebbflow.common.student.lora import Adapter, LoraLinear, merge, signs
from ebbflow.common.student.model import Student

MODULES = ("q_proj", "o_proj", "down_proj")
TOKENS = torch.tensor([[5, 9, 20, 7, 100, 4], [1, 2, 3, 4, 5, 6]])


def students(seed: int = 3) -> tuple[Student, Student]:
    return Student.random(config(), seed, 0.2), Student.random(config(), seed, 0.2)


def test_the_frozen_matrices_are_the_same_on_every_machine() -> None:
    down_RI = signs(7, "model.layers.0.self_attn.q_proj", 4, 32)
    assert down_RI.dtype == torch.float32
    digest = hashlib.sha256((down_RI > 0).numpy().tobytes()).hexdigest()
    assert digest == "acf13b69db6fd3767bad7eda8110c044e865abf3b745bc87069a8cc9f2382909"
    torch.testing.assert_close(down_RI.norm(dim=1), torch.ones(4))


def test_every_seed_and_every_layer_has_other_matrices() -> None:
    found = [signs(seed, name, 4, 32) for seed in (1, 2) for name in ("a", "b")]
    assert len({tuple(each.flatten().tolist()) for each in found}) == 4


def test_the_signs_are_even() -> None:
    down_RI = signs(1, "x", 64, 1000)
    assert abs(float((down_RI > 0).float().mean()) - 0.5) < 4 * 0.5 / 64_000**0.5


def test_an_adapter_of_zeros_changes_nothing_and_all_but_it_is_frozen() -> None:
    plain, changed = students()
    adapter = Adapter(changed, MODULES, 4, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(changed(TOKENS), plain(TOKENS), rtol=0, atol=0)
    trainable = [parameter for parameter in changed.parameters() if parameter.requires_grad]
    assert {id(each) for each in trainable} == {id(each) for each in adapter.parameters}
    assert sum(each.numel() for each in trainable) == adapter.dimension
    assert sum(isinstance(module, LoraLinear) for module in changed.modules()) == 3 * 2


def test_values_stand_in_the_order_of_the_plan() -> None:
    _, changed = students()
    adapter = Adapter(changed, MODULES, 2, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters):
            parameter.fill_(number + 1)
    values = adapter.values()
    for number, slot in enumerate(slots(config(), MODULES, 2)):
        assert torch.all(values[slot.begin : slot.end] == number + 1)
    adapter.reset()
    assert not adapter.values().any()
    assert values.any(), "what was read stays"


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_change_computes_what_the_adapter_computes(tied: bool) -> None:
    shape = config() if tied else type(config())(**{**vars(config()), "tie_word_embeddings": False})
    plain, changed = (Student.random(shape, 3, 0.2) for _ in range(2))
    adapter = Adapter(changed, MODULES, 4, seed=9)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.normal_(0.0, 0.1, generator=generator)
        before = plain(TOKENS)
        merge(plain, adapter.values(), MODULES, 4, seed=9)
        torch.testing.assert_close(plain(TOKENS), changed(TOKENS), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain(TOKENS), before, atol=1e-2)


def test_the_sum_of_changes_is_the_change_of_the_sum() -> None:
    once, together = students()
    size = Adapter(students()[0], MODULES, 4, seed=9).dimension
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randn(size, generator=generator) * 0.1 for _ in range(2))
    merge(once, first, MODULES, 4, seed=9)
    merge(once, second, MODULES, 4, seed=9)
    merge(together, first + second, MODULES, 4, seed=9)
    for one, other in zip(once.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(one, other)
