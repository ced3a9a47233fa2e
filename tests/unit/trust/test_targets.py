"""Target paths: one form for each kind of file, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust.roles import PRECISIONS
from ebbflow.common.trust.targets import manifest_path, parse_path, path_of, tokenizer_path, variant_path

student_ids = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
kinds = st.sampled_from(["manifest", "tokenizer", *PRECISIONS])


def test_paths_have_the_documented_form() -> None:
    assert manifest_path("faq", 3) == "student/faq/3.manifest.json"
    assert tokenizer_path("faq", 3) == "student/faq/3.tokenizer.json"
    assert variant_path("faq", 3, "int8") == "student/faq/3.int8.safetensors"


@given(student_ids, st.integers(1, 10**10 - 1), kinds)
def test_parsing_inverts_making(student_id: str, number: int, kind: str) -> None:
    parsed = parse_path(path_of(student_id, number, kind))
    assert (parsed.student_id, parsed.number, parsed.kind) == (student_id, number, kind)


@given(st.text(max_size=40))
def test_every_path_that_parses_is_canonical(text: str) -> None:
    for path in (text, f"student/{text}", f"student/faq/{text}", f"student/faq/3.{text}.safetensors"):
        try:
            parsed = parse_path(path)
        except EbbflowError:
            continue
        assert path_of(parsed.student_id, parsed.number, parsed.kind) == path


@pytest.mark.parametrize(
    "path",
    [
        "student/../3.int8.safetensors",
        "student/faq/../../3.int8.safetensors",
        "student/faq/03.int8.safetensors",
        "student/faq/0.manifest.json",
        "student/faq/3.int2.safetensors",
        "student/faq/3.manifest.json\n",
        "student//3.manifest.json",
        "/student/faq/3.manifest.json",
    ],
)
def test_look_alikes_are_refused(path: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        parse_path(path)
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_unknown_precisions_and_numbers_below_one_are_refused() -> None:
    with pytest.raises(EbbflowError, match="precision"):
        variant_path("faq", 3, "fp8")
    with pytest.raises(EbbflowError, match="begins at 1"):
        manifest_path("faq", 0)
