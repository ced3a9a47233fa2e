from typing import Any

import pytest
from google.protobuf import json_format

from ebbflow.api.v1 import distillation_pb2
from ebbflow.cloud.distillation.private_recipe import PrivateRecipe
from ebbflow.common.errors import EbbflowError, Reason

GOOD: dict[str, Any] = {"epsilon": 4.0, "steps": 100, "batch_size": 8, "corpus_size": 200, "learning_rate": 1e-3}


def _read(**fields: Any) -> PrivateRecipe:
    message = distillation_pb2.PrivateTraining(**{**GOOD, **fields})
    return PrivateRecipe.from_json(json_format.MessageToDict(message), 64)


def test_zero_stands_for_what_the_contract_says() -> None:
    recipe = _read()
    assert (recipe.delta, recipe.clip_norm, recipe.sequence_length, recipe.rank) == (1e-6, 1.0, 64, 0)
    assert recipe.sampling_rate == 0.04


def test_what_the_worker_wrote_down_changes_nothing() -> None:
    assert _read(noise_multiplier=1.5, pld_epsilon=3.9, prv_epsilon=4.0) == _read()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", float("nan")),
        ("epsilon", 100.0),
        ("delta", 0.01),
        ("delta", 0.005),
        ("delta", 1e-16),
        ("delta", float("nan")),
        ("steps", 0),
        ("steps", 100_001),
        ("batch_size", 0),
        ("batch_size", 201),
        ("corpus_size", 0),
        ("clip_norm", -1.0),
        ("clip_norm", float("inf")),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("rank", 257),
    ],
)
def test_an_impossible_value_is_named(field: str, value: float) -> None:
    with pytest.raises(EbbflowError, match=field) as caught:
        _read(**{field: value})
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_json_of_another_message_is_refused() -> None:
    with pytest.raises(EbbflowError) as caught:
        PrivateRecipe.from_json({"epsilonz": 1}, 64)
    assert caught.value.reason is Reason.INVALID_REQUEST
