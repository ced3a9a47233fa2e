"""The C libraries: compiled where there is a compiler, done without where there is none."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from ebbflow.common.codes import compiled
from ebbflow.common.codes.rans import NumpyCoder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a wheel is made of, as far as it concerns the libraries."""
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "common", root / "common", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    for name in ("cloud", "edge"):
        (root / name / "ebbflow").mkdir(parents=True)
    return root


def test_every_library_is_compiled_in_place(hook: ModuleType, tree: Path) -> None:
    warnings: list[str] = []
    outputs = hook.compile_all(tree, warnings.append)
    assert warnings == []
    assert outputs == [library.output for library in hook.LIBRARIES]
    assert ctypes.CDLL(str(tree / outputs[0])).ebbflow_rans_abi() == compiled._ABI
    assert not list(tree.rglob(".*.so.*"))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", str(ROOT / "LICENSE")])
def test_without_a_compiler_that_works_nothing_old_stays_and_somebody_is_told(
    hook: ModuleType, tree: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hook.compile_all(tree, print) is not None
    monkeypatch.setenv("CC", compiler)
    warnings: list[str] = []
    assert hook.compile_all(tree, warnings.append) is None
    assert "numpy" in warnings[0]
    assert not list(tree.rglob("*.so*"))


def test_a_chosen_compiler_may_have_arguments(hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('cc') or shutil.which('gcc') or 'clang'} -DEBBFLOW_CHOSEN=1")
    assert hook.find_compiler()[1] == "-DEBBFLOW_CHOSEN=1"
    assert hook.compile_all(tree, print) is not None


def test_sources_that_do_not_compile_are_shown_to_who_builds_by_hand(tree: Path) -> None:
    (tree / "common/ebbflow/common/codes/native/rans.c").write_text("int broken(")
    done = subprocess.run([sys.executable, "hatch_build.py"], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rans.c:1" in done.stderr
    without = {**os.environ, "CC": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "hatch_build.py"], cwd=tree, env=without, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "no C compiler" in done.stderr


@pytest.mark.parametrize(("compiler", "pure"), [(None, False), ("no-such-compiler", True)])
def test_a_wheel_says_what_it_runs_on(tree: Path, compiler: str | None, pure: bool) -> None:
    environment = {**os.environ, **({"CC": compiler} if compiler else {})}
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tree / "dist")],
        cwd=tree,
        env=environment,
        capture_output=True,
        check=True,
    )
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") == pure
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        tag = next(archive.read(name) for name in names if name.endswith("/WHEEL"))
    assert ("ebbflow/common/codes/native/rans.so" in names) != pure
    assert "ebbflow/common/codes/native/rans.c" in names
    assert f"Root-Is-Purelib: {str(pure).lower()}".encode() in tag
    assert pure or b"Tag: py3-none-" in tag
    assert b"manylinux" not in tag


@pytest.mark.parametrize("content", [None, b"no library", b"another"])
def test_without_a_library_that_fits_numpy_codes(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "rans.so"
    if content == b"another":
        (tmp_path / "other.c").write_text("int ebbflow_rans_abi(void) { return 99; }\n")
        command = [shutil.which("cc") or "gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "other.c")]
        subprocess.run(command, check=True)
    elif content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(compiled, "LIBRARY", library)
    assert isinstance(compiled.best_coder.__wrapped__(), NumpyCoder)
