"""The kernels where this process cannot run them: under sanitizers, on Arm, and out of other compilers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
KERNELS = "edge/ebbflow/edge/engine/kernels"
X86 = {"avx512", "avxvnni", "avx2", "portable"}
ZIG = f"{sys.executable} -m ziglang cc"
STRICT = "-fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the tests of engines need, without compiled files."""
    root = tmp_path / "tree"
    without = shutil.ignore_patterns("*.so", "__pycache__", "benchmarks", "e2e", "faults")
    for name in ("common", "edge", "cloud", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=without)
    (root / "deploy").mkdir()
    for name in ("pyproject.toml", "hatch_build.py"):
        shutil.copy(ROOT / name, root / name)
    return root


def needed(tool: str, package: str) -> str:
    found = shutil.which(tool)
    assert found, f"{tool} is missing: on Debian, apt-get install {package}"
    return found


def build(tree: Path, **settings: str) -> Path:
    """Compiles the libraries and the self-test beside them; returns the self-test."""
    environment = {**os.environ, **settings}
    done = subprocess.run(
        [sys.executable, "hatch_build.py"], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    compiler = settings.get("CC", "cc").split()
    command = [*compiler, *settings.get("CFLAGS", "").split(), "-o", "selftest", "selftest.c", "libebb.so", "-lm"]
    subprocess.run([*command, "-Wl,-rpath,$ORIGIN"], cwd=tree / KERNELS, check=True)
    return tree / KERNELS / "selftest"


def checked(command: list[str], **settings: str) -> set[str]:
    """Runs a self-test; returns the instruction sets that it has held against the portable one."""
    environment = {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing_in_the_self_test(tree: Path, sanitizers: str) -> None:
    selftest = build(tree, CFLAGS=f"-fsanitize={sanitizers} {STRICT}")
    assert "portable" in checked([str(selftest)], UBSAN_OPTIONS="print_stacktrace=1")


@pytest.mark.sanitizers
def test_sanitizers_find_nothing_in_the_tests_of_engines(tree: Path) -> None:
    build(tree, CFLAGS=f"-fsanitize=address,undefined {STRICT}")
    found = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(found.stdout.strip()).resolve()),
        # Python keeps its own memory to the end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    files = ["tests/unit/engine/test_kernels.py", "tests/contract/test_engines.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(tree / "t"),
    ]
    done = subprocess.run(
        [*command, *files], cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert "AddressSanitizer" not in done.stderr


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-gcc", f"{ZIG} -target aarch64-linux-gnu.2.17"])
def test_arm_computes_what_portable_code_computes(tree: Path, compiler: str) -> None:
    needed("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")
    qemu = needed("qemu-aarch64", "qemu-user")
    selftest = build(tree, CC=compiler)
    for processor, sets in (("max", {"i8mm", "dotprod"}), ("cortex-a76", {"dotprod"}), ("cortex-a53", set())):
        found = checked([qemu, "-cpu", processor, "-L", "/usr/aarch64-linux-gnu", str(selftest)])
        assert found == {"portable", *sets}, processor


@pytest.mark.parametrize("compiler", ["gcc", "clang", f"{ZIG} -target x86_64-linux-gnu.2.17"])
def test_every_compiler_makes_every_instruction_set_of_x86(tree: Path, compiler: str) -> None:
    if compiler == "clang" and not shutil.which("clang"):
        compiler = ZIG  # clang with other defaults
        assert importlib.util.find_spec("ziglang")
    selftest = build(tree, CC=compiler)
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    known = {"avx512": "avx512_bf16", "avxvnni": "avx_vnni", "avx2": "avx2", "portable": "fpu"}
    assert checked([str(selftest)]) == {name for name in X86 if known[name] in flags}
