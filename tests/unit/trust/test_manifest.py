"""The manifest's encoding: one form, every rule checked, no crash on any bytes."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust.manifest import MAX_BYTES, Manifest, ManifestVariant, Probe
from ebbflow.common.trust.roles import PRECISIONS
from ebbflow.common.trust.targets import variant_path

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
losses = st.floats(0, 1e6)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    student = draw(st.sampled_from(["faq", "a", "long-name-7"]))
    release = draw(st.integers(1, 10**9))
    precisions = draw(st.sets(st.sampled_from(PRECISIONS), min_size=1))
    variants = {
        precision: ManifestVariant(variant_path(student, release, precision), draw(st.integers(1, 2**40)), draw(losses))
        for precision in sorted(precisions)
    }
    sequences = st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=5).map(tuple)
    token_ids = tuple(draw(st.lists(sequences, min_size=1, max_size=3)))
    probe = Probe(token_ids, draw(st.floats(1e-6, 10)))
    config = draw(st.dictionaries(st.text(), json_values, max_size=3))
    kept = tuple(sorted(draw(st.sets(st.text(max_size=9), max_size=3))))
    return Manifest(student, release, config, variants, probe, kept)


def an_example() -> Manifest:
    variant = ManifestVariant(variant_path("faq", 3, "int8"), 1000, 3.25)
    return Manifest("faq", 3, {"hidden_size": 64}, {"int8": variant}, Probe(((1, 2, 3), (4, 5)), 0.05))


@given(manifests())
def test_decoding_inverts_encoding_and_the_encoding_is_unique(manifest: Manifest) -> None:
    data = manifest.to_json()
    decoded = Manifest.from_json(data)
    assert decoded == manifest
    assert decoded.to_json() == data


@given(manifests(), st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_gives_another_valid_manifest(manifest: Manifest, at: int, value: int) -> None:
    data = bytearray(manifest.to_json())
    data[at % len(data)] = value
    try:
        decoded = Manifest.from_json(bytes(data))
    except EbbflowError:
        return
    assert decoded.to_json() == bytes(data)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    with pytest.raises(EbbflowError) as caught:
        Manifest.from_json(data)
    assert caught.value.reason is Reason.FILE_CORRUPT


def changed(path: str, value: Any) -> bytes:
    fields = json.loads(an_example().to_json())
    *parents, last = path.split("/")
    place = fields
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", 2),
        ("format", None),
        ("student", "FAQ"),
        ("student", "other"),
        ("release", 4),
        ("release", 3.0),
        ("release", True),
        ("config", []),
        ("variants", {}),
        ("variants/fp8", {}),
        ("variants/int8/target", "student/faq/3.int4.safetensors"),
        ("variants/int8/size_bytes", 0),
        ("variants/int8/size_bytes", True),
        ("variants/int8/probe_loss", -0.5),
        ("variants/int8/probe_loss", 3),
        ("variants/int8/extra", 1),
        ("variants/int8/size_bytes", None),
        ("probe/tolerance", 0.0),
        ("probe/token_ids", []),
        ("probe/token_ids", [[1]]),
        ("probe/token_ids", [[1, -1]]),
        ("probe/token_ids", [[1, 2**31]]),
        ("probe/token_ids", [[1, 2.0]]),
        ("probe/token_ids", [[1, 2]] * (1 << 16)),
        ("extra", 1),
        ("kept_bf16", []),
        ("kept_bf16", ["b", "a"]),
        ("kept_bf16", ["a", "a"]),
        ("kept_bf16", [1]),
        ("kept_bf16", "lm_head.weight"),
    ],
)
def test_every_rule_is_checked(path: str, value: Any) -> None:
    with pytest.raises(EbbflowError) as caught:
        Manifest.from_json(changed(path, value))
    assert caught.value.reason is Reason.FILE_CORRUPT


def test_a_manifest_names_sensitive_matrices_only_if_there_are_any() -> None:
    assert b"kept_bf16" not in an_example().to_json()
    named = dataclasses.replace(an_example(), kept_bf16=("lm_head.weight",))
    assert b'"kept_bf16":["lm_head.weight"]' in named.to_json()
    with pytest.raises(EbbflowError):
        dataclasses.replace(an_example(), kept_bf16=("b", "a")).to_json()


@pytest.mark.parametrize(
    "data",
    [
        an_example().to_json() + b"\n",
        an_example().to_json().replace(b'"release":3', b'"release": 3'),
        an_example().to_json().replace(b'"release":3', b'"release":3,"release":3'),
        an_example().to_json().replace(b"3.25", b"3.250"),
        an_example().to_json().replace(b"3.25", b"NaN"),
        an_example().to_json().replace(b"3.25", b"1e999"),
        b"[" * 100_000,
        b"\xff\xfe",
        b" " * (MAX_BYTES + 1),
    ],
)
def test_other_encodings_of_the_same_thing_are_refused(data: bytes) -> None:
    with pytest.raises(EbbflowError) as caught:
        Manifest.from_json(data)
    assert caught.value.reason is Reason.FILE_CORRUPT


def test_what_cannot_be_decoded_cannot_be_encoded() -> None:
    for loss in (float("nan"), float("inf"), -1.0):
        variant = ManifestVariant(variant_path("faq", 3, "int8"), 1000, loss)
        with pytest.raises(EbbflowError):
            Manifest("faq", 3, {}, {"int8": variant}, Probe(((1, 2),), 0.05)).to_json()
    with pytest.raises(EbbflowError):
        Manifest("faq", 3, {"x": {1, 2}}, an_example().variants, an_example().probe).to_json()


def test_the_mean_weighs_sequences_by_predicted_tokens() -> None:
    probe = Probe(((1, 2, 3), (4, 5)), 0.05)
    assert probe.mean([1.0, 4.0]) == pytest.approx((2 * 1.0 + 1 * 4.0) / 3)
