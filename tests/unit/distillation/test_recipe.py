from typing import Any

import pytest
from google.protobuf import json_format

from ebbflow.api.v1 import distillation_pb2
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.common.errors import EbbflowError, Reason

GOOD: dict[str, Any] = {"steps": 100, "batch_size": 8, "sequence_length": 64, "learning_rate": 1e-3, "kl_weight": 0.9}


def _read(**fields: Any) -> Recipe:
    return Recipe.from_json(json_format.MessageToDict(distillation_pb2.Recipe(**{**GOOD, **fields})))


def test_zero_stands_for_what_the_contract_says() -> None:
    recipe = _read()
    assert (recipe.gradient_accumulation, recipe.warmup_steps, recipe.temperature) == (1, 5, 1.0)
    assert (recipe.sequences, recipe.precision) == (800, "float32")


def test_patterns_of_sensitive_matrices_are_read() -> None:
    assert _read().keep_bf16 == ()
    assert _read(keep_bf16=["lm_head.*", "model.layers.0.*"]).keep_bf16 == ("lm_head.*", "model.layers.0.*")


def test_large_seeds_survive_json() -> None:
    assert _read(seed=2**63 + 1).seed == 2**63 + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("sequence_length", 0),
        ("gradient_accumulation", 9),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", 2.0),
        ("warmup_steps", 101),
        ("kl_weight", 1.1),
        ("kl_weight", float("nan")),
        ("temperature", -1.0),
        ("temperature", 1e9),
        ("keep_bf16", [""]),
        ("keep_bf16", ["x" * 201]),
        ("keep_bf16", ["*"] * 65),
    ],
)
def test_an_impossible_value_is_named(field: str, value: Any) -> None:
    with pytest.raises(EbbflowError, match=field) as caught:
        _read(**{field: value})
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_json_of_another_message_is_refused() -> None:
    with pytest.raises(EbbflowError) as caught:
        Recipe.from_json({"stepz": 1})
    assert caught.value.reason is Reason.INVALID_REQUEST
