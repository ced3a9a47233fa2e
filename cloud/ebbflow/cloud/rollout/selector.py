"""Label selectors such as "site=berlin,ring=beta": which agents a student or a list is about."""

import re
from collections.abc import Mapping

import sqlalchemy as sa

from ebbflow.cloud.registry.tables import Agent
from ebbflow.common.errors import EbbflowError, Reason

MAX_LABELS = 32
_KEY = re.compile(r"[a-z0-9](?:[a-z0-9._/-]{0,61}[a-z0-9])?")
_VALUE = re.compile(r"[A-Za-z0-9._-]{0,63}")


def parse(selector: str) -> dict[str, str]:
    """Returns the labels that a selector asks for; all of them must match, and none matches every agent.

    Raises:
        EbbflowError: INVALID_REQUEST if it is not KEY=VALUE, separated by commas.
    """
    wanted: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in selector.split(","))):
        key, equals, value = part.partition("=")
        if not equals or key in wanted:
            message = f"a selector is KEY=VALUE,KEY=VALUE with each key once, not {selector[:80]!r}"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="selector")
        wanted[key] = value
    return check_labels(wanted)


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Returns the labels if an agent can carry them.

    Raises:
        EbbflowError: INVALID_REQUEST if a key or value has other characters, or there are more than 32.
    """
    for key, value in labels.items():
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            message = f"{key[:70]}={value[:70]} is no label: letters, digits, '.', '_', '-', up to 63 of them"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="labels")
    if len(labels) > MAX_LABELS:
        raise EbbflowError(Reason.INVALID_REQUEST, f"at most {MAX_LABELS} labels", field="labels")
    return dict(labels)


def matches(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether an agent with these labels is meant."""
    return all(labels.get(key) == value for key, value in wanted.items())


def clauses(wanted: Mapping[str, str]) -> list[sa.ColumnElement[bool]]:
    """The same as `matches`, in SQL over `Agent`."""
    return [Agent.labels[key].as_string() == value for key, value in wanted.items()]
