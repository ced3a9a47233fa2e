"""Names of the roles of The Update Framework as this project uses them, and of the fields that we sign with them."""

import datetime as dt
from typing import Final

ROOT: Final = "root"
TARGETS: Final = "targets"
SNAPSHOT: Final = "snapshot"
TIMESTAMP: Final = "timestamp"

STUDENT: Final = "student"
"""Delegated role that lists every file of every release; signed by distiller and gate together."""
STUDENT_PATHS: Final = ("student/*/*",)
STUDENT_THRESHOLD: Final = 2

FEEDBACK: Final = "feedback"
"""Delegated role whose keys sign the plans of rounds. It lists no files; devices only take its keys from `targets`."""
FEEDBACK_PATHS: Final = ("feedback/*",)
FEEDBACK_THRESHOLD: Final = 1

ROOT_THRESHOLD: Final = 2

MIN_RELEASE: Final = "min_release"
"""Field of the signed part of `student`: the lowest release by student id that a device may install."""

HIGHEST: Final = "highest"
"""Field of the signed part of `student`: the highest release by student id that was ever listed. A new release must be
above it, so that one that was taken back cannot return."""

LIFETIMES: Final = {
    ROOT: dt.timedelta(days=365),
    TARGETS: dt.timedelta(days=330),  # not on the root's day: two offline ceremonies at once go wrong together
    STUDENT: dt.timedelta(days=14),
    SNAPSHOT: dt.timedelta(days=7),
    TIMESTAMP: dt.timedelta(days=1),
}
"""How long a signature of each role holds."""

WARNING: Final = dt.timedelta(days=60)
"""How long before its end an offline signature is asked for."""

PRECISIONS: Final[tuple[str, ...]] = ("bf16", "int8", "int4")
KINDS: Final[tuple[str, ...]] = ("manifest", "tokenizer", *PRECISIONS)
"""What a file of a release can be. A precision stands for the weights in that precision."""


def custom(student_id: str, number: int, kind: str) -> dict[str, str | int]:
    """Returns what the signed `custom` field of one file of a release says."""
    return {"student": student_id, "release": number, "kind": kind}
