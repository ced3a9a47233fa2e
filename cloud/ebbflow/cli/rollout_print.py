"""Rollouts on standard output."""

import datetime as dt
from typing import Any

from ebbflow.cli import rollout_view
from ebbflow.cli.output import Column, Format, print_list, print_one, when, word
from ebbflow.cli.quantities import percent
from ebbflow.cli.rollout_view import position


def state_of(rollout: Any) -> str:
    """Returns where a rollout stands, as a word."""
    from ebbflow.api.v1.rollout_pb2 import Rollout

    return word(Rollout.State, rollout.state)


def _saved(rollout: Any) -> str:
    saved_bytes = rollout.full_bytes - rollout.fetched_bytes
    return percent(saved_bytes / rollout.full_bytes) if rollout.full_bytes and saved_bytes > 0 else "-"


COLUMNS: list[Column] = [
    ("NAME", lambda rollout: rollout.name),
    ("RELEASE", lambda rollout: rollout.release),
    ("STATE", state_of),
    ("PHASE", position),
    ("SUCCEEDED", lambda rollout: rollout.counts.succeeded),
    ("FAILED", lambda rollout: rollout.counts.failed),
    ("ASSIGNED", lambda rollout: rollout.counts.assigned),
    ("WAITING", lambda rollout: rollout.counts.waiting),
    ("BYTES SAVED", _saved),
    ("CREATED (UTC)", lambda rollout: when(rollout.create_time)),
    ("REASON", lambda rollout: rollout.reason),
]


def print_row(output: Format, rollout: Any) -> None:
    """Prints one rollout: its JSON, or its line of the list."""
    if output is Format.JSON:
        print_one(output, rollout)
    else:
        print_list(output, [rollout], COLUMNS)


def print_report(rollout: Any) -> None:
    """Prints everything there is to see of a rollout."""
    for line in rollout_view.lines(rollout_view.view(rollout, dt.datetime.now(dt.UTC))):
        print(line)
