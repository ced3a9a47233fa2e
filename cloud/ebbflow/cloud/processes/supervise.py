"""Keeps the embedded processes running: starts them, starts them again when they fail, stops them at the end."""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ebbflow.cloud.processes.settings import CloudSettings

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
STEADY_S = 60.0
"""A process that lived so long starts again without a wait that its earlier failures earned."""
GRACE_S = 15.0
"""Time that a process gets to end by itself; a worker needs it for its checkpoint."""


@dataclass(frozen=True)
class Child:
    """A process to keep running."""

    name: str
    command: Sequence[str]


def children_of(settings: CloudSettings) -> list[Child]:
    """The processes of an embedded cloud; the teacher only where one is configured."""
    wanted = ["teach"] * bool(settings.teacher) + ["work", "gate"]
    arguments = ["--home", str(settings.home)]
    start = [sys.executable, "-m", "ebbflow.cloud.processes.child", str(os.getpid()), "cloud"]
    return [Child(name, [*start, name, *arguments]) for name in wanted]


class Supervisor:
    """Keeps children running until `run` is cancelled; ends its own children and no others."""

    def __init__(
        self, children: Sequence[Child], log_folder: Path, *, first_backoff_s: float = FIRST_BACKOFF_S
    ) -> None:
        self._children = children
        self._log_folder = log_folder
        self._first_backoff_s = first_backoff_s

    async def run(self) -> None:
        """Runs until cancelled; returns once every child has ended."""
        self._log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with asyncio.TaskGroup() as group:
            for child in self._children:
                group.create_task(self._keep(child))

    async def _keep(self, child: Child) -> None:
        backoff_s = self._first_backoff_s
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            code = await self._live(child)
            if clock() - began >= STEADY_S:
                backoff_s = self._first_backoff_s
            where = self._log_file(child)
            _log.warning("cloud %s ended with code %s; again in %.1f s; see %s", child.name, code, backoff_s, where)
            await asyncio.sleep(backoff_s)
            backoff_s = min(MAX_BACKOFF_S, 2 * backoff_s)

    async def _live(self, child: Child) -> int:
        """Runs a child once, for as long as it lives."""
        with self._log_file(child).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C on the terminal is for the parent, which then stops its children
            )
        _log.info("cloud %s runs as process %d", child.name, process.pid)
        try:
            return await process.wait()
        except asyncio.CancelledError:
            await _end(child, process)
            raise

    def _log_file(self, child: Child) -> Path:
        return self._log_folder / f"{child.name}.log"


async def _end(child: Child, process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(GRACE_S):
            await process.wait()
    except TimeoutError:
        _log.warning("cloud %s did not end within %.0f s", child.name, GRACE_S)
        process.kill()
        await process.wait()
