"""The rooms' walls: who may import whom, and what must not be there."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORTIONS = ("cloud", "edge", "common")

# A room may import from itself, from those named here, and from outside.
MAY_IMPORT = {
    "ebbflow.api": set[str](),
    "ebbflow.common": {"ebbflow.api"},
    "ebbflow.client": {"ebbflow.api", "ebbflow.common"},
    "ebbflow.cloud": {"ebbflow.api", "ebbflow.common", "ebbflow.client"},
    "ebbflow.edge": {"ebbflow.api", "ebbflow.common", "ebbflow.client"},
    # The `cloud` commands start processes; everything else goes through the client.
    "ebbflow.cli": {"ebbflow.api", "ebbflow.common", "ebbflow.client", "ebbflow.cloud.processes"},
}

EXCEPTIONS = {
    # Starts a sibling process as the command line that an operator would type.
    "ebbflow.cloud.processes.child": ("ebbflow.cli.main",),
}


def modules() -> Iterator[tuple[str, Path]]:
    for portion in PORTIONS:
        for path in sorted((ROOT / portion).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT / portion).with_suffix("").parts), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def test_ebbflow_is_a_namespace_in_every_portion() -> None:
    assert [portion for portion in PORTIONS if (ROOT / portion / "ebbflow" / "__init__.py").exists()] == []


def test_every_room_is_typed() -> None:
    rooms = [path for portion in PORTIONS for path in (ROOT / portion / "ebbflow").iterdir() if path.is_dir()]
    assert [room.name for room in rooms if room.name != "__pycache__" and not (room / "py.typed").exists()] == []


def test_rooms_import_only_from_where_they_may() -> None:
    wrong = []
    for module, path in modules():
        room = next(room for room in MAY_IMPORT if inside(module, room))
        allowed = {room, *MAY_IMPORT[room], *EXCEPTIONS.get(module, ())}
        names = [name for name in imports(path) if name.startswith("ebbflow.")]
        wrong += [f"{module} imports {name}" for name in names if not any(inside(name, room) for room in allowed)]
    assert wrong == []


HEAVY = ("torch", "transformers", "opacus")
LIGHT_MODULES = {
    "ebbflow.cli.main": (*HEAVY, "sqlalchemy", "grpc", "google.protobuf", "cryptography"),
    "ebbflow.edge.main": (*HEAVY, "sqlalchemy", "grpc", "fastapi"),
    "ebbflow.client.admin": (*HEAVY, "sqlalchemy"),
    "ebbflow.edge.agent.runtime": (*HEAVY, "sqlalchemy"),
    "ebbflow.cloud.processes.serve": HEAVY,
    "ebbflow.cloud.processes.supervise": HEAVY,
    "ebbflow.cloud.processes.init": HEAVY,
}


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_processes_stay_free_of_what_they_do_not_need(module: str) -> None:
    program = f"import sys, {module}; print([m for m in {LIGHT_MODULES[module]!r} if m in sys.modules])"
    path = ":".join(str(ROOT / portion) for portion in PORTIONS)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={"PYTHONPATH": path}
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
