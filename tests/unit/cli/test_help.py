import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ebbflow.cli.main import app

ROOT = Path(__file__).resolve().parents[3]
PATH = ":".join(str(ROOT / portion) for portion in ("cloud", "edge", "common"))
WHOLE = typer.main.get_command(app)


def commands(command: Any = WHOLE, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def leaves(command: Any = WHOLE, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", {})
    if not children:
        yield path, command
    for name, child in children.items():
        yield from leaves(child, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_help_ends_with_an_example_of_its_own_command(
    run_alone: Callable[..., Any], path: tuple[str, ...]
) -> None:
    shown = run_alone(*path, "--help")
    assert shown.code == 0
    _, mark, end = shown.out.rpartition("Example:\n")
    assert mark
    lines = [line.strip() for line in end.strip().splitlines()]
    assert lines[0].startswith(" ".join(["ebbflow", *path]))
    assert all(len(line) <= 116 for line in lines)


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_example_of_a_single_line_can_be_parsed(run_alone: Callable[..., Any], path: tuple[str, ...]) -> None:
    import shlex

    _, _, end = run_alone(*path, "--help").out.rpartition("Example:\n")
    lines = end.replace("\\\n", " ").strip().splitlines()
    for line in lines:
        words, command = shlex.split(line)[1:], WHOLE
        while getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
        command.make_context("ebbflow", words, resilient_parsing=False)


def test_the_promised_commands_are_all_there() -> None:
    wanted = """cloud init|serve|teach|work|gate; cloud db upgrade|check; admin create; token create|list|revoke;
        agent list|show|get|revoke|label|reinstate|pin|unpin; student create|list|show|policy;
        distillation start|watch|list|cancel; release list|show|watch|diff|revoke|min;
        rollout start|watch|list|show|pause|resume|abort|approve|retry|back|advise; round open|close|list|show;
        privacy show; audit list"""
    known = set(commands())
    for part in wanted.split(";"):
        *group, verbs = part.split()
        for verb in verbs.split("|"):
            assert (*group, verb) in known


ALWAYS_JSON = {("trust", "key", "show")}


def test_every_reading_command_prints_json_too() -> None:
    for path, command in leaves():
        if path[-1] in {"list", "show", "get", "watch", "diff", "policy", "advise"} and path not in ALWAYS_JSON:
            assert any("--output" in option.opts and "-o" in option.opts for option in command.params), path


def _python(program: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": PATH, "HOME": "/nonexistent"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)


def test_help_loads_nothing_heavy() -> None:
    heavy = ("grpc", "google.protobuf", "cryptography", "sqlalchemy", "torch", "numpy", "rich", "asyncio")
    program = (
        "import sys; from ebbflow.cli.main import app\n"
        "try: app(['--help'])\n"
        f"finally: print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = _python(program)
    assert done.stderr.strip() == "[]"
    assert "Usage:" in done.stdout


def test_a_client_command_loads_neither_torch_nor_sqlalchemy() -> None:
    program = (
        "import sys; sys.argv = ['ebbflow', 'agent', 'list']; from ebbflow.cli.main import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'sqlalchemy', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = _python(program)
    assert done.stdout.strip() == "[]"
    assert "no admin context" in done.stderr
    assert done.returncode == 5


def test_no_client_module_loads_torch_or_sqlalchemy() -> None:
    program = (
        "import sys, ebbflow.client.admin, ebbflow.client.context, ebbflow.client.pinning\n"
        "print([m for m in ('torch', 'sqlalchemy', 'numpy') if m in sys.modules])"
    )
    assert _python(program).stdout.strip() == "[]"


def test_the_version_names_software_and_api(run_alone: Callable[..., Any]) -> None:
    shown = run_alone("--version")
    assert shown.code == 0
    assert shown.out.startswith("ebbflow ")
    assert "API ebbflow.api.v1" in shown.out


def test_a_wrong_command_line_ends_with_2(run_alone: Callable[..., Any]) -> None:
    assert run_alone("agent", "list", "--nonsense").code == 2
    assert run_alone("nonsense").code == 2
    assert run_alone("agent", "list", "-o", "yaml").code == 2
