"""Keeping child processes alive, with real processes."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ebbflow.cloud.processes import supervise
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.processes.supervise import Child, Supervisor

PROGRAM = "import os, sys, time; print(os.getpid(), flush=True); time.sleep({seconds})"


def child(name: str = "work", seconds: float = 60) -> Child:
    return Child(name, [sys.executable, "-c", PROGRAM.format(seconds=seconds)])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - other processes set no event here
            await asyncio.sleep(0.02)


async def pids(folder: Path, least: int, name: str = "work") -> list[int]:
    path = folder / f"{name}.log"
    await until(lambda: path.exists() and len(path.read_text().split()) >= least)
    return [int(word) for word in path.read_text().split()]


def lives(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def stop(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_child_that_is_killed_is_started_again(tmp_path: Path) -> None:
    task = asyncio.create_task(Supervisor([child()], tmp_path, first_backoff_s=0.01).run())
    (first,) = await pids(tmp_path, 1)
    os.kill(first, signal.SIGKILL)
    _, second = await pids(tmp_path, 2)
    assert lives(second)
    await stop(task)
    assert not lives(second)


async def test_a_child_that_fails_at_once_is_not_started_ever_faster(tmp_path: Path) -> None:
    task = asyncio.create_task(Supervisor([child(seconds=0)], tmp_path, first_backoff_s=0.2).run())
    await pids(tmp_path, 2)
    await asyncio.sleep(0.3)
    assert len(await pids(tmp_path, 2)) <= 3
    await stop(task)


async def test_each_child_has_a_log_of_its_own(tmp_path: Path) -> None:
    task = asyncio.create_task(Supervisor([child("work"), child("gate")], tmp_path).run())
    assert (await pids(tmp_path, 1, "work")) != (await pids(tmp_path, 1, "gate"))
    await stop(task)


@pytest.mark.parametrize(("teacher", "names"), [("", ["work", "gate"]), ("/models/t", ["teach", "work", "gate"])])
def test_a_teacher_is_hosted_only_where_one_is_configured(tmp_path: Path, teacher: str, names: list[str]) -> None:
    settings = CloudSettings.load(tmp_path, teacher=teacher)
    assert [child.name for child in supervise.children_of(settings)] == names


async def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    # The child stands where the command line would, and says its process id.
    fake = tmp_path / "ebbflow_child.py"
    fake.write_text(
        "import os, sys, types, time\n"
        "module = types.ModuleType('ebbflow.cli.main')\n"
        f"def main():\n    open({str(log)!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
        "module.main = main\n"
        "sys.modules['ebbflow.cli.main'] = module\n"
        "from ebbflow.cloud.processes import child\nchild.main()\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"import os, subprocess, sys; subprocess.run([sys.executable, {str(fake)!r}, str(os.getpid()), 'cloud'])",
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    await until(lambda: log.exists() and log.read_text() != "")
    pid = int(log.read_text())
    parent.kill()
    await parent.wait()
    await until(lambda: not lives(pid) or is_zombie(pid))


def is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
