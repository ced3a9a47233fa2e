"""The demo's children: waited for, ended, and named with their log when they fail."""

import sys
from pathlib import Path

import pytest

from demo.processes import DemoError, Processes, tail


def test_a_child_that_ends_by_itself_is_named_with_its_log(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    child = processes.start("cloud", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], {})
    child.process.wait()
    with pytest.raises(DemoError, match="cloud ended with code 3") as caught:
        processes.wait("its start", lambda: None, 5.0)
    assert caught.value.log == child.log
    assert tail(child.log) == "why"
    processes.stop()


def test_waiting_gives_up_and_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="its start: nothing for 0 s") as caught:
        Processes(tmp_path).wait("its start", lambda: None, 0.0, tmp_path / "x.log")
    assert caught.value.log == tmp_path / "x.log"


def test_stop_ends_every_child(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    children = [processes.start(name, [sys.executable, "-c", "import time; time.sleep(60)"], {}) for name in ("a", "b")]
    assert set(processes.ids) == {"a", "b"}
    processes.check()
    processes.stop()
    assert all(child.process.returncode is not None for child in children)
    assert not processes.ids
