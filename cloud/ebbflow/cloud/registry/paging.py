"""Pages of long lists, by key and not by offset (AIP-158)."""

import base64
import binascii
import datetime as dt
import json
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import InstrumentedAttribute, Session

from ebbflow.cloud.registry.tables import UtcDateTime
from ebbflow.common.errors import EbbflowError, Reason

Row = TypeVar("Row")

DEFAULT_SIZE = 50
MAX_SIZE = 1000


def page(
    session: Session,
    query: sa.Select[Row],
    keys: list[InstrumentedAttribute[Any]],
    page_size: int,
    page_token: str,
    *,
    descending: bool = False,
) -> tuple[list[Row], str]:
    """Returns one page of a query and the token of the next one, which is empty at the end.

    Rows that appear or vanish between two calls never shift others onto a page twice.

    Args:
        session: where to ask.
        query: selects one model, unordered.
        keys: its columns to order by; together unique.
        page_size: 0 means 50, more than 1000 means 1000.
        page_token: the token of the page before, or empty.
        descending: whether the largest keys come first.

    Raises:
        EbbflowError: INVALID_REQUEST for a negative size, PAGE_TOKEN_INVALID for a token that is not ours.
    """
    if page_size < 0:
        raise EbbflowError(Reason.INVALID_REQUEST, "page_size must not be negative", field="page_size")
    size = min(page_size or DEFAULT_SIZE, MAX_SIZE)
    if page_token:
        after = sa.tuple_(
            *(sa.literal(value, key.type) for value, key in zip(_decode(page_token, keys), keys, strict=True))
        )
        row = sa.tuple_(*keys)
        query = query.where(row < after if descending else row > after)
    order = [key.desc() if descending else key.asc() for key in keys]
    rows = list(session.scalars(query.order_by(*order).limit(size + 1)))
    if len(rows) <= size:
        return rows, ""
    return rows[:size], _encode([getattr(rows[size - 1], key.key) for key in keys])


def _encode(values: list[Any]) -> str:
    plain = [value.isoformat() if isinstance(value, dt.datetime) else value for value in values]
    return base64.urlsafe_b64encode(json.dumps(plain).encode()).decode()


def _decode(token: str, keys: list[InstrumentedAttribute[Any]]) -> list[Any]:
    try:
        plain = json.loads(base64.urlsafe_b64decode(token.encode()))
        if not isinstance(plain, list) or len(plain) != len(keys):
            raise ValueError
        return [_typed(value, key.type) for value, key in zip(plain, keys, strict=True)]
    except (ValueError, TypeError, binascii.Error) as error:
        raise EbbflowError(Reason.PAGE_TOKEN_INVALID, "page_token is not one that this server gave") from error


def _typed(value: Any, kind: sa.types.TypeEngine[Any]) -> Any:
    if isinstance(kind, UtcDateTime):
        time = dt.datetime.fromisoformat(value)
        if time.tzinfo is None:
            raise ValueError
        return time
    if not isinstance(value, kind.python_type):
        raise TypeError
    return value
