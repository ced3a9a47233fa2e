"""What people type on a command line, turned into values. No IO."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")
_LONGEST_S = 36_500 * 86_400
_LABEL_KEY = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._/-]{0,62}")


def _wrong(message: str, field: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, message, field=field)


def seconds(text: str) -> float:
    """Reads a time such as "90s", "1h30m" or "7d".

    Raises:
        EbbflowError: INVALID_REQUEST if it is none.
    """
    if not _DURATION.fullmatch(text):
        raise _wrong(f"{text!r} is no time such as 90s, 15m, 1h30m or 7d", "duration")
    total_s = sum(float(number) * _UNITS_S[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text))
    if total_s > _LONGEST_S:
        raise _wrong(f"{text!r} is longer than a hundred years", "duration")
    return total_s


def labels(pairs: Iterable[str]) -> dict[str, str]:
    """Reads labels such as "site=berlin".

    Raises:
        EbbflowError: INVALID_REQUEST if one has no "=" or a senseless key.
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not _LABEL_KEY.fullmatch(key):
            raise _wrong(f"{pair!r} is no label such as site=berlin", "labels")
        found[key] = value
    return found


def label_changes(changes: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Reads "site=berlin" as a label to set and "ring-" as one to remove.

    Raises:
        EbbflowError: INVALID_REQUEST if one is neither.
    """
    wanted = list(changes)
    removed = [change[:-1] for change in wanted if "=" not in change and change.endswith("-") and len(change) > 1]
    return labels(change for change in wanted if "=" in change or not change.endswith("-")), removed


def shares(pairs: Iterable[str]) -> dict[str, float]:
    """Reads a mixture such as "datetime=2".

    Raises:
        EbbflowError: INVALID_REQUEST if one is no topic with a share of 0 or more.
    """
    found = {}
    for pair in pairs:
        topic, _, share = pair.rpartition("=")
        try:
            found[topic] = float(share)
        except ValueError:
            found[topic] = -1.0
        if not topic or not 0 <= found[topic] < float("inf"):
            raise _wrong(f"{pair!r} is no share of a topic such as datetime=0.5", "mixture")
    return found


def full_name(collection: str, text: str) -> str:
    """Returns the resource name; people may leave its collection out: "kiosk-7" is "agents/kiosk-7".

    Raises:
        EbbflowError: INVALID_REQUEST if it is no name of the collection.
    """
    name = text if "/" in text else f"{collection}/{text}"
    names.parse(name, collection)
    return name


def release_name(text: str) -> str:
    """Returns a release's name from "students/faq/releases/3", or shorter "faq/3".

    Raises:
        EbbflowError: INVALID_REQUEST if it is neither.
    """
    short = re.fullmatch(r"([a-z0-9-]+)/(\d{1,10})", text)
    name = f"students/{short[1]}/releases/{short[2]}" if short else text
    names.parse_release(name)
    return name


def release_of(student: str, text: str) -> str:
    """Returns the name of a student's release; its number alone will do.

    Raises:
        EbbflowError: INVALID_REQUEST if it is no release of the student.
    """
    student_id = names.parse(full_name("students", student), "students")
    name = release_name(f"{student_id}/{text}" if text.isdecimal() else text)
    if names.parse_release(name)[0] != student_id:
        raise _wrong(f"{name} is no release of students/{student_id}", "release")
    return name


def population_name(text: str) -> str:
    """Returns the name of a generation from "students/faq/populations/3", or shorter "faq/3"; "faq" means the newest.

    Raises:
        EbbflowError: INVALID_REQUEST if it is none of them.
    """
    short = re.fullmatch(r"([a-z0-9-]+)(?:/(\d{1,10}))?", text)
    name = f"students/{short[1]}/populations/{short[2] or '-'}" if short else text
    if not name.endswith("/populations/-"):
        names.parse_population(name)
    return name


def short_release(name: str) -> str:
    """Returns "faq/3" for "students/faq/releases/3", for people."""
    return name.removeprefix("students/").replace("/releases/", "/")


ARCHITECTURE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocabulary_size",
    "max_position_embeddings",
    "rope_theta",
    "initial_checkpoint",
)


def architecture(toml: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of an `Architecture` from a TOML text, overridden by options that are not None.

    Raises:
        EbbflowError: INVALID_REQUEST if the text is no TOML, or a field is unknown, of the wrong type or missing.
    """
    try:
        fields = tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise _wrong(f"the architecture file is not TOML: {error}", "architecture") from None
    fields |= {name: value for name, value in options.items() if value is not None}
    for name, value in fields.items():
        kinds: tuple[type, ...] = (int,)
        if name == "initial_checkpoint":
            kinds = (str,)
        elif name == "rope_theta":
            kinds = (int, float)
        if name not in ARCHITECTURE_FIELDS or isinstance(value, bool) or not isinstance(value, kinds):
            known = ", ".join(ARCHITECTURE_FIELDS)
            raise _wrong(f"{name} = {value!r} is no field of an architecture ({known})", "architecture")
    missing = [n for n in ("hidden_size", "num_hidden_layers", "num_attention_heads") if not fields.get(n)]
    if missing and not fields.get("initial_checkpoint"):
        raise _wrong(f"the architecture lacks {', '.join(missing)}", "architecture")
    return fields
