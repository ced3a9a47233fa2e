"""The C libraries: compiled where there is a compiler, done without where there is none."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from ebbflow.common.codes import compiled
from ebbflow.common.codes.rans import NumpyCoder
from ebbflow.edge.engine.library import _SIGNATURES, open_library

ROOT = Path(__file__).parents[2]
RANS = "common/ebbflow/common/codes/native/rans.so"
EBB = "edge/ebbflow/edge/engine/kernels/libebb.so"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-O0")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a wheel is made of, as far as it concerns the libraries."""
    root = tmp_path / "tree"
    for name in ("common", "edge"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    (root / "cloud" / "ebbflow").mkdir(parents=True)
    return root


def test_every_library_is_compiled_in_place(hook: ModuleType, tree: Path) -> None:
    warnings: list[str] = []
    outputs = hook.compile_all(tree, warnings.append)
    assert warnings == []
    assert outputs == [library.output for library in hook.LIBRARIES]
    assert ctypes.CDLL(str(tree / RANS)).ebbflow_rans_abi() == compiled._ABI
    assert open_library(tree / EBB).ebb_isa()
    assert sorted(tree.rglob("*.so*")) == sorted(tree / output for output in outputs)


def test_libraries_say_nothing_but_what_their_headers_promise(hook: ModuleType, tree: Path) -> None:
    assert hook.compile_all(tree, print)
    library = ctypes.CDLL(str(tree / EBB))
    header = (tree / EBB).with_name("ebb.h").read_text(encoding="utf-8")
    promised = set(re.findall(r"^EBB_API .*?(ebb_\w+)\(", header, re.MULTILINE))
    assert promised == set(_SIGNATURES)
    assert all(hasattr(library, name) for name in promised)
    assert not hasattr(library, "ebb_product")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", str(ROOT / "LICENSE")])
def test_without_a_compiler_that_works_nothing_old_stays_and_somebody_is_told(
    hook: ModuleType, tree: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in hook.LIBRARIES:
        (tree / library.output).write_bytes(b"old")
    monkeypatch.setenv("CC", compiler)
    warnings: list[str] = []
    assert hook.compile_all(tree, warnings.append) == []
    assert "numpy" in warnings[0]
    assert "torch" in warnings[-1]
    assert not list(tree.rglob("*.so*"))


def test_one_library_that_does_not_compile_does_not_take_the_others_along(hook: ModuleType, tree: Path) -> None:
    (tree / EBB).with_name("pack.c").write_text("int broken(")
    (tree / EBB).write_bytes(b"old")
    warnings: list[str] = []
    assert hook.compile_all(tree, warnings.append) == [RANS]
    assert "pack.c:1" in warnings[0]
    assert "the engine of torch does its work" in warnings[0]
    assert [path.name for path in tree.rglob("*.so*")] == ["rans.so"]


def test_a_compiler_that_knows_no_instruction_set_leaves_it_out(
    hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tree / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mavx512bf16*|*-march=armv8*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    warnings: list[str] = []
    assert hook.compile_all(tree, warnings.append)[-1] == EBB
    assert warnings == []
    library = open_library(tree / EBB)
    assert library.ebb_use_isa(b"avx512") == -1
    assert library.ebb_use_isa(b"dotprod") == -1
    assert library.ebb_use_isa(b"portable") == 0


def test_a_chosen_compiler_may_have_arguments(hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('cc') or shutil.which('gcc') or 'clang'} -DEBBFLOW_CHOSEN=1")
    assert hook.find_compiler()[1] == "-DEBBFLOW_CHOSEN=1"
    assert len(hook.compile_all(tree, print)) == len(hook.LIBRARIES)


def test_sources_that_do_not_compile_are_shown_to_who_builds_by_hand(tree: Path) -> None:
    (tree / RANS).with_suffix(".c").write_text("int broken(")
    command = [sys.executable, "hatch_build.py"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rans.c:1" in done.stderr
    without = {**os.environ, "CC": "no-such-compiler"}
    done = subprocess.run(command, cwd=tree, env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "no C compiler" in done.stderr


@pytest.mark.parametrize(
    ("settings", "tag"),
    [
        ({}, f"linux_{platform.machine()}"),
        ({"CC": "no-such-compiler"}, "any"),
        ({"WHEEL_PLATFORM": "manylinux_2_17_riscv64"}, "manylinux_2_17_riscv64"),
    ],
)
def test_a_wheel_says_what_it_runs_on(tree: Path, settings: dict[str, str], tag: str) -> None:
    environment = {**os.environ, **settings}
    pure = tag == "any"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tree / "dist")],
        cwd=tree,
        env=environment,
        capture_output=True,
        check=True,
    )
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name) for name in names if name.endswith("/WHEEL"))
    libraries = {RANS.removeprefix("common/"), EBB.removeprefix("edge/")}
    assert names & libraries == (set() if pure else libraries)
    assert "ebbflow/common/codes/native/rans.c" in names
    assert f"Root-Is-Purelib: {str(pure).lower()}".encode() in metadata
    assert f"Tag: py3-none-{tag}".encode() in metadata


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
