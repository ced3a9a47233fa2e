"""Forks devices that install a release and are killed on the way. Run by test_crash.py.

Reads one JSON object per line: {"folder", "number", "kill_at", "kill_after_s"}. The device kills itself with SIGKILL
right before its `kill_at`-th operation on a file of its folder, if it was not killed after a time before. Answers each
line with the exit status that `wait` gave.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import structlog
from delivery_device import start_device

from ebbflow.client.endpoint import Endpoint

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


def kill_at(number: int, folder: str) -> None:
    """Arms the trap."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _EVENTS and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def install(folder: Path, number: int, endpoint: Endpoint, root: bytes) -> None:
    """What an agent does from its start to the commit of the next release."""
    device = start_device(folder, endpoint, root)
    device.serving()
    device.install(number)


def wait(child: int, kill_after_s: float) -> int:
    """Waits for a child, kills it when its time is over, and returns its status."""
    end_s = time.monotonic() + kill_after_s
    while time.monotonic() < end_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    """Serves the lines."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout carries the answers
    config = json.loads(sys.stdin.readline())
    names = ("authority_pem", "certificate_pem", "key_pem")
    endpoint = Endpoint(config["address"], *(config[name].encode() for name in names))
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            kill_at(order["kill_at"], order["folder"])
            install(Path(order["folder"]), order["number"], endpoint, config["root"].encode())
            os._exit(0)
        print(wait(child, order["kill_after_s"]), flush=True)


if __name__ == "__main__":
    main()
