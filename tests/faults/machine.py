"""Machines: a folder, a disk and clock that can be disturbed, and real processes that can be killed."""

import contextlib
import json
import mmap
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deploy_world import environment
from faults import powercut

HERE = Path(__file__).parent
_FIELDS = ("operations", "kill_at", "fail_kinds", "fail_after", "fail_times", "fail_errno", "space_bytes", "clock_ns")
_WORD = struct.Struct("=q")
_JOURNAL_BYTES = 256 << 20
T = TypeVar("T")


def compile_shim(folder: Path) -> Path:
    """Compiles shim.c.

    Raises:
        AssertionError: there is no C compiler here.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "these tests need a C compiler: apt-get install gcc"
    shim = folder / "shim.so"
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(shim), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return shim


def until(what: str, look: Callable[[], T | None], timeout_s: float = 60.0, every_s: float = 0.02) -> T:
    """Returns the first answer that is not None or False."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if found := look():
            return found
        time.sleep(every_s)
    raise AssertionError(f"{what} did not happen within {timeout_s:.0f} s")


class Zygote:
    """Starts processes by forking an interpreter that has everything imported. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        shim = compile_shim(folder)
        given = environment({"LD_PRELOAD": str(shim), "GRPC_VERBOSITY": "NONE", "TOKENIZERS_PARALLELISM": "false"})
        given["PYTHONPATH"] += os.pathsep + str(HERE.parent)
        with (folder / "zygote.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "zygote.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=given,
            )
        self._hear()

    def start(self, order: Mapping[str, Any]) -> int:
        """Starts a process; returns its id."""
        pid: int = self._ask(order)["pid"]
        return pid

    def poll(self, pid: int) -> int | None:
        """Exit status of a process, None while it runs. To be asked until it has ended, and not afterwards."""
        status: int | None = self._ask({"poll": pid})["status"]
        return status

    def close(self) -> None:
        """Ends it and everything that it started."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            stream.close()
        self._process.wait(30)

    def _ask(self, order: Mapping[str, Any]) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> Any:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], 120)
        assert ready, "the zygote does not answer"
        line = self._process.stdout.readline()
        assert line, "the zygote has ended; see zygote.log"
        return json.loads(line)


class Machine:
    """One machine: its folder, its processes, its disk and its clock."""

    def __init__(self, zygote: Zygote, folder: Path, name: str) -> None:
        """Makes `folder/name` the machine's disk; everything beside it is the test's."""
        self.name, self._zygote = name, zygote
        self.disk = folder / name
        self._aside = folder / f"{name}.aside"
        self._shadows = self._aside / "shadows"
        for made in (self.disk, self._shadows):
            made.mkdir(parents=True, mode=0o700)
        self._journal = self._aside / "journal"
        control = self._aside / "control"
        control.write_bytes(bytes(_WORD.size * len(_FIELDS)))
        with control.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), 0)
        self.heal()
        self.pids: dict[str, int] = {}

    @property
    def processes(self) -> list[str]:
        """Names of all processes that ever ran here."""
        return sorted(path.stem for path in self._aside.glob("*.log"))

    def __getitem__(self, field: str) -> int:
        value: int = _WORD.unpack_from(self._control, _WORD.size * _FIELDS.index(field))[0]
        return value

    def __setitem__(self, field: str, value: int) -> None:
        _WORD.pack_into(self._control, _WORD.size * _FIELDS.index(field), value)

    def heal(self) -> None:
        """Ends every disturbance."""
        for field in _FIELDS[1:]:
            self[field] = -1 if field == "space_bytes" else 0

    def log(self, process: str) -> Path:
        """Where a process writes."""
        return self._aside / f"{process}.log"

    def start(self, process: str, command: Sequence[object], given: Mapping[str, str] | None = None) -> int:
        """Starts a process of this machine under a name."""
        assert process not in self.pids, f"{process} runs already"
        self.pids[process] = self._zygote.start(
            {
                "run": [str(word) for word in command],
                "environment": dict(given or {}),
                "log": str(self.log(process)),
                "arm": [str(path) for path in (self._aside / "control", self._journal, self.disk, self._shadows)],
            }
        )
        return self.pids[process]

    def ended(self, process: str) -> int | None:
        """Exit status of a process that has ended by now, negative for a signal; None while it runs."""
        status = self._zygote.poll(self.pids[process])
        if status is not None:
            del self.pids[process]
        return status

    def run(self, command: Sequence[object], given: Mapping[str, str] | None = None) -> None:
        """Runs a command to its good end."""
        self.start("command", command, given)
        status = self.wait("command", 120)
        assert status == 0, f"{command} ended with {status}:\n{self.tail('command')}"

    def wait(self, process: str, timeout_s: float = 120) -> int:
        """Waits for the end of a process; returns its exit status."""
        end_s = time.monotonic() + timeout_s
        while (status := self.ended(process)) is None:
            assert time.monotonic() < end_s, f"{self.name}: {process} did not end:\n{self.tail(process)}"
            time.sleep(0.005)
        return status

    def kill(self, process: str) -> bool:
        """Ends a process with SIGKILL.

        Returns:
            Whether it was SIGKILL, this one or the shim's, that ended it.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[process], signal.SIGKILL)
        status = self.wait(process)
        assert status == -signal.SIGKILL, f"{self.name}: {process} ended by itself: {status}\n{self.tail(process)}"
        return True

    def kill_all(self) -> None:
        """Ends every process with SIGKILL, as a power cut does."""
        for process in list(self.pids):
            self.kill(process)

    def cut_power(self, chance: random.Random) -> list[str]:
        """Kills everything, and takes back what was never synced; returns what was lost."""
        self.kill_all()
        lost = powercut.cut(self.disk, self._journal, chance)
        with self.log("power").open("a") as log:
            print("power cut:", *lost, sep="\n  ", file=log)
        self.forget()
        return lost

    def forget(self) -> None:
        """Takes everything that was written so far for synced. No process may run."""
        assert not self.pids
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self._shadows)
        self._shadows.mkdir()

    def settle(self) -> None:
        """Keeps the journal short."""
        if self._journal.exists() and self._journal.stat().st_size > _JOURNAL_BYTES:
            self.forget()

    def operations(self, skip: int = 0) -> Iterator[powercut.Record]:
        """What was done on the disk since the last `forget`."""
        for index, record in enumerate(powercut.read(self._journal)):
            if index >= skip:
                yield record

    def tail(self, process: str, lines: int = 25) -> str:
        """The last lines of a process's log."""
        log = self.log(process)
        text = log.read_text(errors="replace") if log.exists() else "(no log)"
        return "\n".join(line[:400] for line in text.splitlines()[-lines:])
