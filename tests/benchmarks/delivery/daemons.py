"""Rivals' daemons: started in groups of their own, and ended with everything that they have started."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

END_S = 10.0


@contextlib.contextmanager
def daemon(command: Sequence[object], folder: Path, given: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a program in `folder` for as long as the block; what it says goes to `daemons.log` there."""
    with (folder / "daemons.log").open("ab") as log:
        running = subprocess.Popen(
            list(map(str, command)), cwd=folder, env=dict(given), stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield running
    finally:
        _end(running)


def answers(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _end(running: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(END_S)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
