"""Resource names such as "students/faq/releases/3", in the manner of AIP-122."""

import re

from ebbflow.common.errors import EbbflowError, Reason

_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def check_id(value: str, what: str) -> str:
    """Returns `value` if it can be the last part of a name.

    Raises:
        EbbflowError: INVALID_REQUEST if it is not 1 to 63 lower-case letters, digits and inner hyphens.
    """
    if not _ID.fullmatch(value):
        message = f"{what} must be 1 to 63 lower-case letters, digits or inner hyphens, not {value[:80]!r}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field=what)
    return value


def make(collection: str, id_: str) -> str:
    """Joins a collection such as "agents" and an id such as "kiosk-7"."""
    return f"{collection}/{id_}"


def parse(name: str, collection: str) -> str:
    """Returns the id in a name of one collection, such as "kiosk-7" in "agents/kiosk-7".

    Raises:
        EbbflowError: INVALID_REQUEST if the name is of another form.
    """
    head, _, id_ = name.partition("/")
    if head != collection or not _ID.fullmatch(id_):
        message = f"a name of the form {collection}/ID is needed, not {name[:80]!r}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, name=name[:80])
    return id_


def release(student_id: str, number: int) -> str:
    """Name of a release."""
    return f"students/{student_id}/releases/{number}"


def parse_release(name: str) -> tuple[str, int]:
    """Returns student id and number in a release's name.

    Raises:
        EbbflowError: INVALID_REQUEST if the name is of another form.
    """
    return _numbered(name, "releases")


def population(student_id: str, generation: int) -> str:
    """Name of a generation of a student's population."""
    return f"students/{student_id}/populations/{generation}"


def parse_population(name: str) -> tuple[str, int]:
    """Returns student id and generation in a population's name.

    Raises:
        EbbflowError: INVALID_REQUEST if the name is of another form.
    """
    return _numbered(name, "populations")


def _numbered(name: str, collection: str) -> tuple[str, int]:
    match = re.fullmatch(rf"students/([a-z0-9-]{{1,63}})/{collection}/([1-9][0-9]{{0,9}})", name)
    if not match:
        message = f"a name of the form students/ID/{collection}/NUMBER is needed, not {name[:80]!r}"
        raise EbbflowError(Reason.INVALID_REQUEST, message, name=name[:80])
    return match[1], int(match[2])
