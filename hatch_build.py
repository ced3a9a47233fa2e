"""Compiles Ebbflow's C libraries: as a hook of builds and editable installs, or by hand as `python hatch_build.py`.

Nothing needs a library to run: without a C compiler the build goes on, says so, and numpy does the work, more slowly.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or importlib.util.find_spec("hatchling"):
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
else:  # by hand
    BuildHookInterface = object


@dataclass(frozen=True)
class Library:
    """One shared library for ctypes.

    Attributes:
        output: path from the top folder; the same name on every system.
        sources: C files, from the top folder.
        options: of the compiler, beside those of every library.
    """

    output: str
    sources: tuple[str, ...]
    options: tuple[str, ...] = ()


LIBRARIES = (Library("common/ebbflow/common/codes/native/rans.so", ("common/ebbflow/common/codes/native/rans.c",)),)
# Nothing of this machine's processor: a wheel runs on any of the same architecture.
OPTIONS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")


def find_compiler() -> list[str] | None:
    """Returns the command of a C compiler: $CC, cc, gcc, clang, or zig from the wheel `ziglang`."""
    if chosen := shlex.split(os.environ.get("CC", "")):
        return chosen if shutil.which(chosen[0]) else None
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def compile_all(root: Path, warn: Callable[[str], None]) -> list[str] | None:
    """Compiles every library in place; what cannot be compiled is removed, so that no old one outlives its sources.

    Returns:
        The outputs, or None if one is missing now.
    """
    compiler = find_compiler()
    if compiler is None:
        warn(
            "no C compiler, so numpy does the work, more slowly. Install gcc or clang, set CC, or pip install ziglang."
        )
    missing = [library for library in LIBRARIES if compiler is None or not _compile(root, library, compiler, warn)]
    for library in missing:
        (root / library.output).unlink(missing_ok=True)
    return None if missing else [library.output for library in LIBRARIES]


def _compile(root: Path, library: Library, compiler: list[str], warn: Callable[[str], None]) -> bool:
    """Compiles beside the output and renames, so that running processes keep the library that they have mapped."""
    output = root / library.output
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    # Zig would take this machine's own processor.
    portable = ["-mcpu=baseline"] if "ziglang" in compiler or Path(compiler[0]).stem == "zig" else []
    sources = [str(root / source) for source in library.sources]
    command = [*compiler, *OPTIONS, *portable, *library.options, "-o", str(temporary), *sources]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            warn(f"{library.output} could not be compiled; numpy does its work.\n{shlex.join(command)}\n{done.stderr}")
            return False
        temporary.replace(output)
    except OSError as error:
        warn(f"{library.output} could not be compiled; numpy does its work: {error}")
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the libraries into wheels and names the platform that they are for."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, before files are collected."""
        if self.target_name != "wheel":
            return
        outputs = compile_all(Path(self.root), self.app.display_warning)
        if outputs is None:
            return
        from packaging.tags import platform_tags

        # Any Python 3, since ctypes loads them; not "manylinux", which promises an old libc.
        platform = next(tag for tag in platform_tags() if "linux_" not in tag or tag.startswith("linux_"))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].extend(f"/{output}" for output in outputs)


if __name__ == "__main__":
    compiled = compile_all(Path(__file__).parent, lambda text: print(f"ebbflow: {text}", file=sys.stderr))
    sys.exit(compiled is None and find_compiler() is not None)
