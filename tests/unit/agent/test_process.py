"""`ebbflow-edge` as an operator runs it: real processes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from agent_world import CloudWorld
from typer.testing import CliRunner

from ebbflow.edge.main import app

ROOT = Path(__file__).parents[3]
EDGE = [sys.executable, "-m", "ebbflow.edge.main"]
PRIVACY = ("show", "plans", "consent", "pause", "resume", "purge")
COMMANDS = [[], ["enrol"], ["run"], ["status"], ["privacy"], *(["privacy", command] for command in PRIVACY)]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("cloud", "edge", "common"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


async def edge(*arguments: object, **more: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *EDGE,
        *map(str, arguments),
        env=environment(**more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def running(*arguments: object) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, str]]]:
    """Runs an agent; yields it with the words of its ready line."""
    process = await asyncio.create_subprocess_exec(
        *EDGE, "run", *map(str, arguments), env=environment(), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert line.startswith("ready "), line
        yield process, dict(word.split("=", 1) for word in line.split()[1:])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        # asyncio closes a child's pipes a moment after it has ended
        await asyncio.sleep(0.05)


def config(folder: Path, **settings: object) -> Path:
    free = {"http_listen": "127.0.0.1:0", "grpc_listen": "127.0.0.1:0", "cores": 1, "state": str(folder / "state")}
    path = folder / "agent.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in (free | settings).items()))
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_ends_with_an_example(command: list[str]) -> None:
    out = CliRunner().invoke(app, [*command, "--help"]).output
    assert "Example:\n    ebbflow-edge" in out
    assert out.rstrip().splitlines()[-1].startswith("    ebbflow-edge")


async def test_help_imports_nothing_heavy() -> None:
    script = "import sys, ebbflow.edge.main as m; sys.argv = ['x', '--help']\ntry: m.main()\nexcept SystemExit: pass\n"
    script += "print([n for n in ('torch', 'grpc', 'numpy', 'pydantic', 'fastapi', 'sqlite3') if n in sys.modules])"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, env=environment(), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out.decode().splitlines()[-1] == "[]"


async def test_serving_without_a_student_never_loads_torch(cloud: CloudWorld, tmp_path: Path) -> None:
    path = config(tmp_path)
    code, out, err = await edge("enrol", "--cloud", cloud.enrolment, "--token", cloud.token(), "--config", path)
    assert (code, out.startswith("agents/")) == (0, True), err
    async with running("--config", path) as (process, _):
        maps = await asyncio.to_thread(Path(f"/proc/{process.pid}/maps").read_text)
    assert "libtorch" not in maps


async def test_the_operators_day(cloud: CloudWorld, tmp_path: Path) -> None:
    path = config(tmp_path)
    wish = ("--cloud", cloud.enrolment, "--name", "kiosk-7", "--config", path)
    code, out, err = await edge("enrol", *wish, EBBFLOW_EDGE_TOKEN=cloud.token())
    assert (code, out) == (0, "agents/kiosk-7\n"), err
    cloud.student()
    cloud.publish(1)
    cloud.assign("agents/kiosk-7", 1)
    assert await edge("enrol", "--if-missing", "--config", path) == (0, "agents/kiosk-7\n", "")
    async with running("--config", path) as (process, words):
        assert words["agent"] == "agents/kiosk-7"
        published = tomllib.loads((tmp_path / "state/endpoints.toml").read_text())
        assert (published["http"], published["grpc"], published["pid"]) == (words["http"], words["grpc"], process.pid)
        async with openai.AsyncOpenAI(base_url=words["http"], api_key="none", max_retries=10) as client:
            done = await client.completions.create(model="faq", prompt="Use open()", max_tokens=5, user="ada")
        assert done.model == "students/faq/releases/1"
        code, out, _ = await edge("status", "--config", path, "-o", "json")
        status = json.loads(out)
        assert (code, status["connected"], status["models"][0]["release"]) == (0, True, done.model)
        code, out, _ = await edge("status", "--agent", words["grpc"])
        assert "students/faq" in out
        assert "Cloud: connected" in out
        code, out, _ = await edge("privacy", "show", "--config", path)
        assert (code, "1 interactions of 1 users" in out) == (0, True)
        code, out, _ = await edge("privacy", "purge", "--user", "ada", "--config", path)
        assert (code, out) == (0, "1 interactions deleted\n")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    assert not (tmp_path / "state/endpoints.toml").exists()
    code, _, err = await edge("status", "--config", path)
    assert code == 7
    assert "cure: Start the agent" in err
    paths = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert not [path for path in paths if path.is_dir() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]


async def test_sigterm_lets_running_requests_finish(cloud: CloudWorld, tmp_path: Path) -> None:
    path = config(tmp_path)
    await edge("enrol", "--cloud", cloud.enrolment, "--token", cloud.token(), "--name", "kiosk-7", "--config", path)
    cloud.student()
    cloud.publish(1)
    cloud.assign("agents/kiosk-7", 1)
    async with running("--config", path) as (process, words):
        async with openai.AsyncOpenAI(base_url=words["http"], api_key="none", max_retries=10) as client:
            await client.completions.create(model="faq", prompt="Use", max_tokens=1)
            ask: dict[str, Any] = {"model": "faq", "prompt": "Use", "max_tokens": 500, "stream": True}
            streams = [await client.completions.create(**ask, seed=seed) for seed in range(4)]
            process.send_signal(signal.SIGTERM)
            for stream in streams:
                chunks = [chunk async for chunk in stream]
                assert chunks[-1].choices[0].finish_reason
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_what_keeps_an_agent_from_starting_is_named(cloud: CloudWorld, tmp_path: Path) -> None:
    path = config(tmp_path)
    code, _, err = await edge("run", "--config", path)
    assert (code, "ebbflow-edge enrol" in err) == (5, True)
    await edge("enrol", "--cloud", cloud.enrolment, "--token", cloud.token(), "--config", path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for listen in ("http_listen", "grpc_listen"):
            code, _, err = await edge("run", "--config", config(tmp_path, **{listen: f"127.0.0.1:{port}"}))
            assert (code, f"127.0.0.1:{port}" in err) == (7, True)
    code, _, err = await edge("run", "--config", config(tmp_path, colour="red"))
    assert (code, "colour" in err) == (3, True)
    assert (await edge("run", "--config", tmp_path / "nothing.toml"))[0] == 3
    assert (await edge("run", "--nonsense"))[0] == 2
    token = cloud.token()
    assert (await edge("enrol", "--cloud", cloud.enrolment, "--token", token, "--config", config(tmp_path)))[0] == 5


async def test_a_second_agent_on_one_state_folder_is_refused(cloud: CloudWorld, tmp_path: Path) -> None:
    path = config(tmp_path)
    await edge("enrol", "--cloud", cloud.enrolment, "--token", cloud.token(), "--config", path)
    async with running("--config", path):
        code, _, err = await edge("run", "--config", path)
        assert (code, "another ebbflow-edge" in err) == (5, True)
