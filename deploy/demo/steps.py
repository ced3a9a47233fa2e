"""Progress on the terminal, and the time of each step."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Steps:
    """Tells of steps as they are taken.

    Attributes:
        seconds: Time of each step that has ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.monotonic()
        self._live = sys.stdout.isatty()
        self._title = ""

    @property
    def total_s(self) -> float:
        """Time since the beginning."""
        return time.monotonic() - self._begin

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Times a step; steps of one name are added up.

        Args:
            name: Its name in the report.
            title: What the user reads.
        """
        begin = time.monotonic()
        self._title = title
        print(f"[{self.total_s:6.1f} s] {title}", end="\n" if not self._live else " …", flush=True)
        yield
        spent = time.monotonic() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        done = f"[{self.total_s:6.1f} s] {title}: done in {spent:.1f} s"
        print(f"\r\033[K{done}" if self._live else f"           … {spent:.1f} s", flush=True)

    def note(self, text: str) -> None:
        """Shows how far the running step is; only on a terminal."""
        if self._live:
            print(f"\r\033[K[{self.total_s:6.1f} s] {self._title}: {text}"[:140], end="", flush=True)

    def say(self, text: str) -> None:
        """Says something that stays."""
        print(f"           {text}", flush=True)
