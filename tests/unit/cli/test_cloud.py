"""The `cloud` commands as real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PATH = ":".join(str(ROOT / portion) for portion in ("cloud", "edge", "common"))
COMMAND = [sys.executable, "-c", "from ebbflow.cli.main import main; main()"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", **more}


def ebbflow(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, env=environment(**more), timeout=120
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cloud") / "home"
    done = ebbflow("cloud", "init", "--home", str(folder))
    assert done.returncode == 0, done.stderr
    assert "EBBFLOW_CONTEXT" in done.stdout
    return folder


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Path]:
    listen = ["--listen", "127.0.0.1:0", "--enrol-listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*COMMAND, "cloud", "serve", "--alone", "--home", str(home), *listen],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(900):
            if (home / "endpoints.toml").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[1]
        yield home / "admin" / "context.toml"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_an_admin_speaks_with_the_cloud_that_init_made_and_serve_runs(served: Path) -> None:
    listed = ebbflow("agent", "list", "-o", "json", EBBFLOW_CONTEXT=str(served))
    assert (listed.returncode, json.loads(listed.stdout), listed.stderr) == (0, [], "")


def test_a_cloud_is_never_initialised_over(home: Path, run_alone: Callable[..., Any]) -> None:
    again = run_alone("cloud", "init", "--home", str(home))
    assert again.code == 5
    assert "initialised already" in again.err
    assert run_alone("cloud", "init", "--home", str(home), "--if-missing").code == 0


def test_the_schema_is_checked_and_upgraded(
    home: Path, tmp_path: Path, run_alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EBBFLOW_HOME", str(home))
    assert run_alone("cloud", "db", "check").code == 0
    monkeypatch.setenv("EBBFLOW_HOME", str(tmp_path / "new"))
    missing = run_alone("cloud", "db", "check")
    assert missing.code != 0
    assert "cure:" in missing.err
    assert run_alone("cloud", "db", "upgrade").code == 0
    assert run_alone("cloud", "db", "check").code == 0


def test_serving_a_folder_that_is_no_cloud_says_what_to_run(tmp_path: Path) -> None:
    done = ebbflow("cloud", "serve", "--alone", "--home", str(tmp_path))
    assert done.returncode == 5
    assert "ebbflow cloud init" in done.stderr


def test_wrong_settings_are_named(home: Path, run_alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBBFLOW_POLL_INTERVAL_S", "soon")
    done = run_alone("cloud", "serve", "--alone", "--home", str(home))
    assert done.code == 3
    assert "poll_interval_s" in done.err


def test_a_missing_extra_is_named_with_its_cure(tmp_path: Path) -> None:
    program = f"import sys; sys.modules['sqlalchemy'] = None; {COMMAND[-1]}"
    done = subprocess.run(
        [sys.executable, "-c", program, "cloud", "init", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 5
    assert "ebbflow[cloud]" in done.stderr
