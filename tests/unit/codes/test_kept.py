"""Sensitive matrices: who is named by a pattern, and what an artefact may say of them."""

import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from delta_world import CONFIG, moved, random_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.common.codes import container, delta, quantise
from ebbflow.common.codes.artefact import PRECISIONS, Precision, read_variant, size_bytes, weights, write_variant
from ebbflow.common.codes.kept import check_kept, choose_kept, coded_matrices, decode_kept, encode_kept, projections
from ebbflow.common.errors import EbbflowError, Reason

UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)
MATRICES = sorted(coded_matrices(UNTIED))
PATTERNS = st.lists(
    st.sampled_from([*MATRICES, "*", "lm_head.*", "model.layers.?.mlp.*", "*.[qk]_proj.weight", "*.down_proj.weight"]),
    max_size=4,
)
LAYER = "model.layers.0."


def test_a_pattern_names_matrices_and_those_that_are_multiplied_with_them() -> None:
    attention = tuple(sorted(f"{LAYER}self_attn.{letter}_proj.weight" for letter in "qkv"))
    assert choose_kept(CONFIG, ["*.0.self_attn.k_proj.*"]) == attention
    up = choose_kept(CONFIG, ["model.layers.1.mlp.up_proj.weight"])
    assert up == ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    assert choose_kept(CONFIG, ["model.embed*"]) == ("model.embed_tokens.weight",)
    assert choose_kept(CONFIG, []) == ()
    assert choose_kept(UNTIED, ["*"]) == tuple(MATRICES)
    assert choose_kept(CONFIG, ["*.down_proj.weight"]) == (), "72 inputs cannot be coded anyway"


@pytest.mark.parametrize("pattern", ["lm_head.weight", "model.layers.2.*", "*norm*", "*.bias", "", "MODEL.*", "[", "q"])
def test_a_pattern_that_no_matrix_has_is_refused_by_its_name(pattern: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        choose_kept(CONFIG, ["model.*", pattern])
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert repr(pattern) in str(caught.value)
    assert caught.value.metadata["field"] == "recipe.keep_bf16"


@given(patterns=PATTERNS)
def test_what_is_chosen_is_whole_and_comes_back_from_the_metadata(patterns: list[str]) -> None:
    kept = choose_kept(UNTIED, patterns)
    check_kept(kept, UNTIED)
    named = {name for name in MATRICES for pattern in patterns if fnmatchcase(name, pattern)}
    assert named <= set(kept)
    partners = {group for layer in range(2) for group in projections(layer)}
    assert all(name in named or any(name in group and named & set(group) for group in partners) for name in kept)
    assert coded_matrices(UNTIED, kept) == set(MATRICES) - set(kept)
    if kept:
        assert decode_kept(encode_kept(kept), UNTIED) == kept


@pytest.mark.parametrize(
    "names",
    [
        [f"{LAYER}self_attn.q_proj.weight"],
        [f"{LAYER}mlp.up_proj.weight"],
        ["model.norm.weight"],
        [f"{LAYER}mlp.down_proj.weight"],
        [f"{LAYER}self_attn.o_proj.bias"],
        ["lm_head.weight", "lm_head.weight"],
        ["model.embed_tokens.weight", "lm_head.weight"],
        ["model.layers.2.self_attn.o_proj.weight"],
        [],
        [7],
        {"lm_head.weight": 1},
        "lm_head.weight",
        None,
    ],
)
def test_metadata_that_nobody_would_have_written_is_no_list_of_names(names: object) -> None:
    with pytest.raises(ValueError, match="kept"):
        decode_kept(json.dumps(names), UNTIED)


@given(text=st.text(max_size=30) | st.lists(st.sampled_from([*MATRICES, "x"]), max_size=4).map(json.dumps))
def test_any_metadata_is_what_would_be_written_or_refused(text: str) -> None:
    try:
        kept = decode_kept(text, UNTIED)
    except ValueError:
        return
    assert kept == choose_kept(UNTIED, kept)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(patterns=PATTERNS, precision=st.sampled_from(PRECISIONS), again=st.booleans())
def test_an_artefact_says_itself_what_it_keeps(
    tmp_path: Path, patterns: list[str], precision: Precision, again: bool
) -> None:
    kept, written = choose_kept(UNTIED, patterns), random_weights(UNTIED)
    earlier = None
    if again:  # whose own sensitive matrices have no scales to give
        write_variant(tmp_path / "earlier", written, UNTIED, "int8", None, choose_kept(UNTIED, ["*.0.*"]))
        earlier = read_variant(tmp_path / "earlier")
    write_variant(tmp_path / "weights", written, UNTIED, precision, earlier, kept)
    variant, found = read_variant(tmp_path / "weights"), weights(tmp_path / "weights")
    assert (variant.kept_bf16, variant.precision) == (kept, precision)
    coded = {name for name in written if variant.is_coded(name)}
    assert coded == variant.coded_in(precision) == (set() if precision == "bf16" else set(MATRICES) - set(kept))
    for name, weight in written.items():
        if name not in coded:
            np.testing.assert_array_equal(found[name], quantise.from_bf16(quantise.to_bf16(weight)), err_msg=name)
    tensors_bytes = sum(array.nbytes for array in variant.tensors.values())
    assert size_bytes(UNTIED, precision, kept) == tensors_bytes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_artefact_without_sensitive_matrices_is_as_it_was_before_there_were_any(
    tmp_path: Path, precision: Precision
) -> None:
    write_variant(tmp_path / "weights", random_weights(), CONFIG, precision)
    tensors, metadata = container.read(tmp_path / "weights")
    assert metadata.keys() == {"format", "precision", "config"}
    assert read_variant(tmp_path / "weights").kept_bf16 == ()
    assert (f"{LAYER}mlp.up_proj.weight" in tensors) == (precision == "bf16")


@pytest.mark.parametrize("kept", [["lm_head.weight"], [f"{LAYER}mlp.up_proj.weight"], ["x"]])
def test_what_cannot_be_kept_is_not_written(tmp_path: Path, kept: list[str]) -> None:
    with pytest.raises(EbbflowError) as caught:
        write_variant(tmp_path / "weights", random_weights(), CONFIG, "int8", kept_bf16=kept)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert list(tmp_path.iterdir()) == []


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("said", [None, [], [OUTPUT], [EMBEDDING, OUTPUT], ["model.norm.weight"], "x", "deep"])
def test_a_file_whose_tensors_are_not_what_it_says_is_refused(
    tmp_path: Path, precision: Precision, said: object
) -> None:
    write_variant(tmp_path / "weights", random_weights(), CONFIG, precision, kept_bf16=[EMBEDDING])
    content = (tmp_path / "weights").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]["kept_bf16"]
    if said is not None:
        header["__metadata__"]["kept_bf16"] = "[" * 100_000 if said == "deep" else json.dumps(said)
    text = json.dumps(header).encode()
    (tmp_path / "weights").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    if precision == "bf16" and said in (None, [OUTPUT], [EMBEDDING, OUTPUT]):
        assert read_variant(tmp_path / "weights").kept_bf16 == tuple(said or ()), "all is bfloat16 there anyway"
        return
    with pytest.raises(EbbflowError) as caught:
        read_variant(tmp_path / "weights")
    assert caught.value.reason is Reason.FILE_CORRUPT


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(before=PATTERNS, after=PATTERNS, precision=st.sampled_from(PRECISIONS))
def test_a_delta_leads_between_releases_that_keep_other_matrices(
    tmp_path: Path, before: list[str], after: list[str], precision: Precision
) -> None:
    base, target = random_weights(UNTIED), moved(random_weights(UNTIED), 1e-4)
    write_variant(tmp_path / "base", base, UNTIED, precision, None, choose_kept(UNTIED, before))
    write_variant(tmp_path / "target", target, UNTIED, precision, None, choose_kept(UNTIED, after))
    info = delta.encode(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    wanted = (tmp_path / "target").read_bytes()
    delta.apply(tmp_path / "base", tmp_path / "delta", tmp_path / "found", target_size_bytes=len(wanted))
    assert (tmp_path / "found").read_bytes() == wanted
    assert info.statistics["tensors"].keys() == UNTIED.tensor_shapes().keys()


def test_a_matrix_that_stays_sensitive_costs_a_delta_only_what_moved(tmp_path: Path) -> None:
    kept, before = choose_kept(CONFIG, ["model.embed_tokens.*"]), random_weights()
    for what, tensors in (("base", before), ("target", moved(before, 1e-5))):
        write_variant(tmp_path / what, tensors, CONFIG, "int4", None, kept)
    write_variant(tmp_path / "coded", before, CONFIG, "int4")
    same = delta.encode(tmp_path / "base", tmp_path / "target", tmp_path / "delta").size_bytes
    anew = delta.encode(tmp_path / "coded", tmp_path / "target", tmp_path / "delta").size_bytes
    assert same < anew - CONFIG.vocab_size * CONFIG.hidden_size, "one that was codes comes whole"
