"""What every conversion needs."""

import datetime as dt
from typing import Any, TypeVar

from google.protobuf import duration_pb2, json_format, timestamp_pb2
from google.protobuf.message import Message

Kind = TypeVar("Kind", bound=Message)


def timestamp(time: dt.datetime | None) -> timestamp_pb2.Timestamp | None:
    """A time as a message; None leaves the field unset."""
    if time is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(time)
    return message


def duration(message: duration_pb2.Duration, unset: dt.timedelta) -> dt.timedelta:
    """A duration, or `unset` where the field is zero or was not given."""
    return message.ToTimedelta() or unset


def to_json(message: Message) -> dict[str, Any]:
    """Proto JSON, as the registry keeps it."""
    return json_format.MessageToDict(message)


def from_json(kept: dict[str, Any], kind: type[Kind]) -> Kind:
    """Reads proto JSON back, also what an older or newer version wrote."""
    message = kind()
    json_format.ParseDict(kept, message, ignore_unknown_fields=True)
    return message
