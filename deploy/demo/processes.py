"""The demo's child processes: started with a log file each, and ended by their own ids, never by name."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

GRACE_S = 20.0
"""Time that a child gets to end by itself."""


class DemoError(Exception):
    """What went wrong, in a sentence for the user.

    Attributes:
        log: Where more is said, if anywhere.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Child:
    """A running child."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Processes:
    """Children of this demo, ended in the reverse order of their start."""

    def __init__(self, log_folder: Path) -> None:
        """Takes the folder for the children's logs, which exists."""
        self._log_folder = log_folder
        self._children: list[Child] = []

    @property
    def ids(self) -> dict[str, int]:
        """Process ids by name."""
        return {child.name: child.process.pid for child in self._children}

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Starts a child in a session of its own, so that Ctrl-C reaches the demo alone."""
        log = self._log_folder / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises if a child has ended.

        Raises:
            DemoError: with its log.
        """
        for child in self._children:
            if (code := child.process.poll()) is not None:
                raise DemoError(f"{child.name} ended with code {code}", child.log)

    def wait(self, what: str, probe: Callable[[], T | None], limit_s: float, log: Path | None = None) -> T:
        """Asks `probe` until it returns something.

        Args:
            what: What is waited for, for the message.
            probe: Returns None as long as it is not there.
            limit_s: When to give up.
            log: Where to look then.

        Raises:
            DemoError: If a child ends, or nothing comes in time.
        """
        deadline = time.monotonic() + limit_s
        while (found := probe()) is None:
            self.check()
            if time.monotonic() > deadline:
                raise DemoError(f"{what}: nothing for {limit_s:.0f} s", log)
            time.sleep(0.1)
        return found

    def stop(self) -> None:
        """Ends every child that is still there: SIGTERM, and SIGKILL for one that does not heed it."""
        for child in reversed(self._children):
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        for child in reversed(self._children):
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children.clear()


def run(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Runs a command to its end."""
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def program(module: str, *arguments: str) -> list[str]:
    """The command of one of our programs, run by this very Python: "ebbflow.cli.main" or "ebbflow.edge.main"."""
    return [sys.executable, "-c", f"from {module} import main; main()", *arguments]


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
