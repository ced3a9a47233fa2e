"""Configurations: what can be, what Hugging Face says, and what is refused by name."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Ernie4_5Config

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig

HUB_0_3B = {
    "architectures": ["Ernie4_5_ForCausalLM"],
    "auto_map": {"AutoModel": "modeling_ernie4_5.Ernie4_5_Model"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 18,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "use_cache": False,
    "vocab_size": 103424,
    "rope_theta": 500000,
    "rope_scaling": None,
    "use_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
}
GOOD = StudentConfig.from_hf(HUB_0_3B)


def test_the_0_3b_of_the_hub_has_its_published_size() -> None:
    assert GOOD.parameters == 360_748_032
    assert StudentConfig.from_hf(Ernie4_5Config().to_dict()) == GOOD


@given(
    heads=st.integers(1, 8),
    groups=st.integers(1, 8),
    half_width=st.integers(1, 128),
    theta=st.floats(10, 1e6),
    flags=st.tuples(st.booleans(), st.booleans()),
    eos=st.none() | st.integers(0, 9),
)
def test_a_configuration_survives_hugging_face(
    heads: int, groups: int, half_width: int, theta: float, flags: tuple[bool, bool], eos: int | None
) -> None:
    config = dataclasses.replace(
        GOOD,
        num_attention_heads=heads * groups,
        num_key_value_heads=heads,
        head_dim=half_width * 2,
        rope_theta=theta,
        tie_word_embeddings=flags[0],
        use_bias=flags[1],
        eos_token_id=eos,
    )
    assert StudentConfig.from_hf(config.to_hf()) == config
    assert StudentConfig.from_hf(Ernie4_5Config(**config.to_hf()).to_dict()) == config


def test_null_sizes_are_derived_as_transformers_derives_them() -> None:
    nulls: dict[str, Any] = {**HUB_0_3B, "num_key_value_heads": None, "head_dim": None, "eos_token_id": [7]}
    theirs = Ernie4_5Config(**nulls)
    ours = StudentConfig.from_hf(nulls)
    assert (ours.num_key_value_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (16, 64)
    assert ours.eos_token_id == 7


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"compression_ratio": 2.0}, "compression_ratio"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 127}, "head_dim"),
        ({"hidden_size": "1024"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"vocab_size": 1 << 30}, "vocab_size"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"use_bias": "no"}, "use_bias"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"bos_token_id": 103424}, "bos_token_id"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(EbbflowError, match=field) as caught:
        StudentConfig.from_hf({**HUB_0_3B, **change})
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize("field", ["vocab_size", "head_dim", "num_key_value_heads", "model_type"])
def test_what_is_missing_is_refused_by_name(field: str) -> None:
    with pytest.raises(EbbflowError, match=field):
        StudentConfig.from_hf({key: value for key, value in HUB_0_3B.items() if key != field})


def test_fields_that_switch_nothing_on_are_ignored() -> None:
    assert StudentConfig.from_hf({**HUB_0_3B, "quantization_config": None, "some_switch": False}) == GOOD


def test_a_configuration_built_in_code_is_checked_too() -> None:
    with pytest.raises(EbbflowError, match="hidden_size") as caught:
        dataclasses.replace(GOOD, hidden_size=0)
    assert caught.value.reason is Reason.INVALID_REQUEST


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*HUB_0_3B, "rope_parameters", "x"]), ANYTHING, max_size=3), ANYTHING)
def test_nonsense_never_ends_in_another_error(changes: dict[str, Any], nonsense: object) -> None:
    for config in (nonsense, {**HUB_0_3B, **changes}):
        try:
            StudentConfig.from_hf(config)
        except EbbflowError as error:
            assert error.reason is Reason.CHECKPOINT_UNREADABLE  # noqa: PT017 - some changes are no nonsense
