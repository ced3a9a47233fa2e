"""Target paths: the names under which the signed metadata lists the files of a release."""

import re
from dataclasses import dataclass

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.names import check_id
from ebbflow.common.trust.roles import PRECISIONS

_PATH = re.compile(
    r"student/(?P<student>[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)/(?P<number>[1-9][0-9]{0,9})\."
    r"(?:(?P<fixed>manifest|tokenizer)\.json|(?P<precision>bf16|int8|int4)\.safetensors)"
)


@dataclass(frozen=True)
class TargetPath:
    """What a target path says."""

    student_id: str
    number: int
    kind: str
    """"manifest", "tokenizer" or a precision."""


def manifest_path(student_id: str, number: int) -> str:
    """Path of a release's manifest, such as "student/faq/3.manifest.json"."""
    return _path(student_id, number, "manifest.json")


def tokenizer_path(student_id: str, number: int) -> str:
    """Path of a release's tokenizer, such as "student/faq/3.tokenizer.json"."""
    return _path(student_id, number, "tokenizer.json")


def variant_path(student_id: str, number: int, precision: str) -> str:
    """Path of a release's weights in one precision, such as "student/faq/3.int8.safetensors".

    Raises:
        EbbflowError: INVALID_REQUEST if the precision is none of ours.
    """
    if precision not in PRECISIONS:
        message = f"precision must be one of {', '.join(PRECISIONS)}, not {precision[:80]!r}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="precision")
    return _path(student_id, number, f"{precision}.safetensors")


def path_of(student_id: str, number: int, kind: str) -> str:
    """Path of the file of one kind: the inverse of `parse_path`."""
    if kind == "manifest":
        return manifest_path(student_id, number)
    return tokenizer_path(student_id, number) if kind == "tokenizer" else variant_path(student_id, number, kind)


def parse_path(path: str) -> TargetPath:
    """Returns what a path says.

    Raises:
        EbbflowError: INVALID_REQUEST if it is none of the forms above.
    """
    match = _PATH.fullmatch(path)
    if not match:
        raise EbbflowError(
            Reason.INVALID_REQUEST, f"{path[:120]!r} is not the path of a release's file", path=path[:120]
        )
    return TargetPath(match["student"], int(match["number"]), match["fixed"] or match["precision"])


def _path(student_id: str, number: int, file_name: str) -> str:
    if not 1 <= number < 10**10:
        raise EbbflowError(Reason.INVALID_REQUEST, f"a release's number begins at 1, not {number}", field="number")
    return f"student/{check_id(student_id, 'student')}/{number}.{file_name}"
