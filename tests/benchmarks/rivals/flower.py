"""Flower 1.42: a SuperLink in memory, SuperNodes on the same machine, an app that pushes arrays to all of them.

It runs without TLS, and its clients neither hash nor write what they get: both in its favour.
"""

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from delivery.daemons import answers, daemon
from delivery.measure import Cost, Meter, wait_until
from deploy_world import ROOT, free_port
from rivals.environments import python

VERSION = "1.42.0"
APP = Path(__file__).with_name("flower_push")
LIMIT_S = 900.0
READY_S = 120.0
_DEPENDENCIES = (  # its own pin of certifi does not resolve everywhere
    "certifi",
    "numpy<3",
    "grpcio>=1.70,<2",
    "grpcio-health-checking>=1.70,<2",
    "protobuf>=5.28,<7",
    "cryptography>=50,<51",
    "pycryptodome>=3.18,<4",
    "iterators<0.0.3",
    "typer<0.21",
    "uv",
    "tomli",
    "tomli-w",
    "pathspec>=1.0.4",
    "prompt-toolkit>=3.0.52",
    "rich>=14,<15",
    "pyyaml",
    "requests",
    "httpx",
    "click",
    "packaging<26",
    "sqlalchemy[asyncio]>=2.0.45",
    "alembic>=1.18.1",
    "uvicorn[standard]>=0.49,<0.50",
    "fastapi>=0.138,<0.139",
    "starlette>=1.3.1,<1.4",
)


def push(size_mb: int, nodes: int) -> Cost:
    """Pushes to some nodes and measures it.

    Raises:
        RuntimeError, OSError, TimeoutError, subprocess.SubprocessError: it could not be installed, or did not work.
    """
    bin_ = _installed()
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder, link = Path(name), free_port()
        given = _environment(folder, bin_, link)
        superlink = [bin_ / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", link]
        options = ["--database", ":flwr-in-memory:", "--disable-runtime-dependency-installation"]
        server = running.enter_context(daemon([*superlink, *options], folder, given))
        wait_until("the SuperLink's start", lambda: answers(link), READY_S)
        for number in range(nodes):
            address = ["--superlink", f"127.0.0.1:{link}", "--host", "127.0.0.1", "--port", free_port()]
            node = [bin_ / "flower-supernode", "--insecure", *address, "--node-config", f"partition-id={number}"]
            running.enter_context(daemon(node, folder, given))
        return _measure(size_mb, nodes, server.pid, folder, given, bin_)


def _measure(size_mb: int, nodes: int, server_pid: int, folder: Path, given: dict[str, str], bin_: Path) -> Cost:
    out = folder / "rows.jsonl"
    config = f"mb={size_mb} nodes={nodes} rounds=1 out='{out}'"
    app = shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", app / "LICENSE")
    command = [bin_ / "flwr", "run", app, "dep", "--run-config", config]
    subprocess.run(
        list(map(str, command)), env=given, cwd=folder, check=True, timeout=READY_S, stdout=subprocess.DEVNULL
    )
    wait_until("the warm-up", lambda: len(_rows(out)) >= 1, READY_S + 20 * nodes)
    meter = Meter(server_pid)
    wait_until("the push", lambda: len(_rows(out)) >= 2, LIMIT_S)
    row = _rows(out)[1]
    if row["errors"] or [said["size_bytes"] for said in row["had"]] != [size_mb << 20] * nodes:
        raise RuntimeError(f"Flower's nodes did not get everything: {row['errors'][:1]}")
    had_time = max(said["had_time"] for said in row["had"])
    return Cost(had_time - row["told_time"], meter.cpu_s, meter.peak_rss_mb)


def _installed() -> Path:
    interpreter = python("flwr", _DEPENDENCIES)
    if not (interpreter.parent / "flower-superlink").exists():
        command = [str(interpreter), "-m", "pip", "install", "--quiet", "--no-deps", f"flwr=={VERSION}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return interpreter.parent


def _environment(folder: Path, bin_: Path, link: int) -> dict[str, str]:
    (folder / "home").mkdir()
    lines = [
        "[superlink]",
        'default = "dep"',
        "[superlink.dep]",
        f'address = "127.0.0.1:{link}"',
        "insecure = true",
        "",
    ]
    (folder / "home" / "config.toml").write_text("\n".join(lines))
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    own = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(folder / "home")}
    return kept | own | {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
