"""Data on standard output: as a table for people, as JSON (the proto JSON mapping) for programs."""

import datetime as dt
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

Column = tuple[str, Callable[[Any], object]]


class Format(Enum):
    """How to print."""

    TABLE = "table"
    JSON = "json"


def say(text: str) -> None:
    """Tells a person something that is not the data."""
    print(text, file=sys.stderr)


def as_json(message: "Message") -> dict[str, Any]:
    """Returns the proto JSON mapping; fields without presence are there even when they are empty."""
    from google.protobuf.json_format import MessageToDict

    fields: dict[str, Any] = MessageToDict(message, always_print_fields_with_no_presence=True)
    return fields


def print_json(value: object) -> None:
    """Prints a JSON value."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_json_line(message: "Message") -> None:
    """Prints one message as JSON on a line of its own, at once."""
    print(json.dumps(as_json(message), ensure_ascii=False), flush=True)


def print_list(format_: Format, items: Iterable[Any], columns: Sequence[Column]) -> None:
    """Prints messages: as a JSON array, or as a table with one line for each."""
    if format_ is Format.JSON:
        print_json([as_json(item) for item in items])
        return
    rows = [[_cell(value(item)) for _, value in columns] for item in items]
    for line in table([name for name, _ in columns], rows):
        print(line)


def print_one(format_: Format, item: "Message") -> None:
    """Prints one message: as a JSON object, or as lines of names and values."""
    if format_ is Format.JSON:
        print_json(as_json(item))
        return
    from google.protobuf.json_format import MessageToDict

    fields = MessageToDict(item, preserving_proto_field_name=True)
    for line in outline(fields):
        print(line)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table, its columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    ]


def outline(value: Any, indent: str = "") -> Iterable[str]:
    """Yields nested fields as indented lines."""
    pairs = value.items() if isinstance(value, dict) else (("-", item) for item in value)
    for name, item in pairs:
        head = f"{indent}{name}" if name == "-" else f"{indent}{name}:"
        if isinstance(item, dict | list):
            yield head
            yield from outline(item, indent + "  ")
        else:
            yield f"{head} {_cell(item)}"


def word(enum: Any, number: int) -> str:
    """Returns an enumeration's value as a lower-case word without its prefix: "STATE_RUNNING" is "running"."""
    name: str = enum.Name(number)
    prefix = {
        "State": "STATE_",
        "Precision": "PRECISION_",
        "InstallationState": "INSTALLATION_STATE_",
        "OnHalt": "ON_HALT_",
        "Method": "METHOD_",
    }
    return name.removeprefix(prefix.get(enum.DESCRIPTOR.name, "")).lower()


def when(timestamp: "Timestamp") -> str:
    """Returns a time in UTC to the second; "-" if it is unset."""
    if not timestamp.seconds:
        return "-"
    return timestamp.ToDatetime(dt.UTC).strftime("%Y-%m-%d %H:%M:%S")


def pairs(mapping: Any) -> str:
    """Returns labels as "a=b,c=d"."""
    return ",".join(f"{key}={mapping[key]}" for key in sorted(mapping))


def printable(value: object) -> str:
    """Returns it as text that can neither move the terminal's cursor nor break a table, whatever a device sent."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


def _cell(value: object) -> str:
    return printable(value) or "-"
