"""The agent keeps its store open while it runs; `ebbflow-edge privacy show` and `purge` open it beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebbflow.edge.feedback.store import FeedbackStore

ROOT = Path(__file__).parents[3]
LOOK = """
import sys
from contextlib import closing
from pathlib import Path
from ebbflow.edge.feedback.store import FeedbackStore
with closing(FeedbackStore(Path(sys.argv[1]))) as store:
    print(store.count()[0])
"""


def look(path: Path) -> int:
    """Opens the store in another process, as the commands do; returns the interactions that it sees."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("edge", "common"))
    command = [sys.executable, "-c", LOOK, str(path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.parametrize("looks", [1, 2])
def test_a_process_that_looks_takes_nothing_away_from_the_one_that_runs(tmp_path: Path, looks: int) -> None:
    """Closing any descriptor of a file drops every POSIX lock that the process holds on it: SQLite's too."""
    path = tmp_path / "agent.db"
    store = FeedbackStore(path)
    log = path.with_name("agent.db-wal")
    kept = 0
    for _ in range(looks):
        store.record_interaction("faq", "students/faq/releases/1", "ada", "question", "answer")
        kept += 1
        before = log.stat().st_ino
        assert look(path) == kept
        assert log.stat().st_ino == before, "the running process' log was deleted under it"
    store.record_interaction("faq", "students/faq/releases/1", "ada", "question", "answer")
    assert look(path) == kept + 1
    store.close()
    assert look(path) == kept + 1
