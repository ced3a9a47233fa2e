"""Following something that takes long: a bar on a terminal, plain lines elsewhere.

Progress is not data: it goes to standard error.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ebbflow.cli.output import say
from ebbflow.common.errors import Code, EbbflowError

LINE_INTERVAL_S = 10.0
"""A log file wants no line for every step."""
WATCH_S = 86_400.0
"""Deadline of one watching call."""
_TRIES = 10


@dataclass(frozen=True)
class Reading:
    """What there is to see at one moment."""

    state: str
    """One word."""
    done: int
    total: int
    note: str
    """The rest, for people."""

    def line(self, name: str) -> str:
        """Returns it as a line of text."""
        return f"{name} {self.state} {self.done}/{self.total}" + (f" {self.note}" if self.note else "")


def follow(
    name: str,
    stream: Callable[[], Iterable[Any]],
    read: Callable[[Any], Reading],
    ended: Callable[[Any], bool],
    sleep: Callable[[float], object] = time.sleep,
) -> Any:
    """Shows each state of a resource until it has ended, and returns its last.

    A stream that breaks is opened again: what is watched goes on without us.

    Args:
        name: what is watched.
        stream: opens the watching call, which yields the resource each time it changed.
        read: says what to show of it.
        ended: whether it is over.
        sleep: waits.

    Raises:
        EbbflowError: the server's, or SERVER_UNAVAILABLE when it stayed away.
    """
    with _display(name) as show:
        return attend(stream, lambda item: show(read(item)), ended, sleep)


def attend(
    stream: Callable[[], Iterable[Any]],
    show: Callable[[Any], object],
    ended: Callable[[Any], bool],
    sleep: Callable[[float], object] = time.sleep,
) -> Any:
    """Calls `show` with each state of a resource until it has ended, and returns its last; see `follow`.

    Raises:
        EbbflowError: the server's, or SERVER_UNAVAILABLE when it stayed away.
    """
    failures = 0
    while True:
        try:
            for item in stream():
                failures = 0
                show(item)
                if ended(item):
                    return item
        except EbbflowError as error:
            if error.code not in {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED} or failures >= _TRIES:
                raise
        failures += 1
        sleep(min(0.5 * failures, 5.0))


def remaining(seconds: float) -> str:
    """Returns a time to wait as people say it: "3m20s"."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


@contextmanager
def _display(name: str) -> Iterator[Callable[[Reading], None]]:
    if sys.stderr.isatty():
        with _bar(name) as show:
            yield show
    else:
        yield Lines(name).show


class Lines:
    """Plain lines: one for each new state, and one every few seconds in between."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._state, self._time = "", 0.0

    def show(self, reading: Reading) -> None:
        """Prints the reading if it is time to."""
        now = self._clock()
        if reading.state != self._state or now - self._time >= LINE_INTERVAL_S:
            self._state, self._time = reading.state, now
            say(reading.line(self._name))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[Reading], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=None, note="")

        def show(reading: Reading) -> None:
            described = f"{name} {reading.state}"
            progress.update(
                task, description=described, completed=reading.done, total=reading.total or None, note=reading.note
            )

        yield show
