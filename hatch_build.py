"""Compiles Ebbflow's C libraries: as a hook of builds and editable installs, or by hand as `python hatch_build.py`.

Nothing needs a library to run: without a C compiler the build goes on and says so; numpy and torch do the work, more
slowly. Besides its own options it takes those of $CFLAGS, for the compiler and the linker.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

PLATFORM = "WHEEL_PLATFORM"
"""Environment variable: the platform that a wheel is for where $CC compiles for another one."""

if TYPE_CHECKING or importlib.util.find_spec("hatchling"):
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
else:  # by hand
    BuildHookInterface = object


@dataclass(frozen=True)
class Variant:
    """A C file that is compiled once more, for an instruction set that not every machine has.

    Attributes:
        name: defined for the library's other sources as EBB_HAS_<name>.
        source: C file, from the top folder.
        spellings: options that turn the instruction set on, as one compiler or the other wants them.
        condition: of the preprocessor, true where the options have brought all that the source uses. A compiler that
            knows no spelling, or compiles for another architecture, leaves the variant out.
        defines: options that say nothing of the processor.
    """

    name: str
    source: str
    spellings: tuple[tuple[str, ...], ...]
    condition: str
    defines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """One shared library for ctypes.

    Attributes:
        output: path from the top folder; the same name on every system.
        sources: C files, from the top folder.
        does_without: what does the work where it is missing.
        options: of the compiler, beside those of every library.
        variants: sources for instruction sets; the library chooses at run time.
        links: libraries of the system.
    """

    output: str
    sources: tuple[str, ...]
    does_without: str
    options: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    links: tuple[str, ...] = ()


_KERNELS = "edge/ebbflow/edge/engine/kernels"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mfma", "-mf16c")
_ENGINE = Library(
    f"{_KERNELS}/libebb.so",
    tuple(
        f"{_KERNELS}/{name}.c" for name in ("engine", "cache", "choose", "matrix", "pack", "threads", "isa_portable")
    ),
    does_without="the engine of torch",
    # None of them changes what is computed but the rounding of x * y + z.
    options=("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    variants=(
        Variant("AVX2", f"{_KERNELS}/isa_avx2.c", (_AVX2,), "defined(__x86_64__) && defined(__AVX2__)"),
        Variant(
            "AVXVNNI",
            f"{_KERNELS}/isa_avx2.c",
            ((*_AVX2, "-mavxvnni"),),
            "defined(__x86_64__) && defined(__AVXVNNI__)",
            ("-DEBB_VNNI",),
        ),
        Variant("AVX512", f"{_KERNELS}/isa_avx512.c", (_AVX512,), "defined(__x86_64__) && defined(__AVX512BF16__)"),
        Variant(
            "DOTPROD",
            f"{_KERNELS}/isa_neon.c",
            (("-march=armv8.2-a+dotprod",), ("-mcpu=generic+v8_2a+dotprod",)),
            "defined(__aarch64__) && defined(__linux__) && defined(__ARM_FEATURE_DOTPROD)",
        ),
        Variant(
            "I8MM",
            f"{_KERNELS}/isa_neon.c",
            (("-march=armv8.2-a+dotprod+i8mm",), ("-mcpu=generic+v8_2a+dotprod+i8mm",)),
            "defined(__aarch64__) && defined(__linux__) && defined(__ARM_FEATURE_MATMUL_INT8)",
            ("-DEBB_I8MM",),
        ),
    ),
    links=("-lm", "-lpthread"),
)
LIBRARIES = (
    Library("common/ebbflow/common/codes/native/rans.so", ("common/ebbflow/common/codes/native/rans.c",), "numpy"),
    _ENGINE,
)
# Nothing of this machine's processor: a wheel runs on any of the same architecture.
OPTIONS = ("-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def find_compiler() -> list[str] | None:
    """Returns the command of a C compiler: $CC, cc, gcc, clang, or zig from the wheel `ziglang`."""
    if chosen := shlex.split(os.environ.get("CC", "")):
        return chosen if shutil.which(chosen[0]) else None
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def compile_all(root: Path, warn: Callable[[str], None]) -> list[str]:
    """Compiles every library in place; what cannot be compiled is removed, so that no old one outlives its sources.

    Args:
        root: the top folder.
        warn: told what is missing and why.

    Returns:
        The outputs that are there now: as many as `LIBRARIES` where all went well.
    """
    compiler = find_compiler()
    if compiler is None:
        others = " and ".join(library.does_without for library in LIBRARIES)
        warn(
            f"no C compiler, so {others} do the work, more slowly. "
            "Install gcc or clang, set CC, or pip install ziglang."
        )
    made = [library for library in LIBRARIES if compiler and _compile(root, library, compiler, warn)]
    for library in set(LIBRARIES) - set(made):
        (root / library.output).unlink(missing_ok=True)
    return [library.output for library in made]


def _compile(root: Path, library: Library, compiler: list[str], warn: Callable[[str], None]) -> bool:
    """Compiles beside the output and renames, so that running processes keep the library that they have mapped."""
    # Zig would take this machine's own processor.
    portable = ["-mcpu=baseline"] if "ziglang" in compiler or Path(compiler[0]).stem == "zig" else []
    compiler = [*compiler, *OPTIONS, *portable, *library.options, *shlex.split(os.environ.get("CFLAGS", ""))]
    output = root / library.output
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            options = {variant: _options(compiler, variant, Path(folder)) for variant in library.variants}
            known = {variant: found for variant, found in options.items() if found is not None}
            has = [f"-DEBB_HAS_{variant.name}" for variant in known]
            units = [(source, has) for source in library.sources]
            units += [(variant.source, found) for variant, found in known.items()]
            objects = [str(Path(folder) / f"{index}.o") for index in range(len(units))]
            commands = [
                [*compiler, *own, "-c", "-o", unit, str(root / source)]
                for unit, (source, own) in zip(objects, units, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_call, commands))
            _call([*compiler, "-shared", "-o", f"{folder}/library", *objects, *library.links])
            Path(folder, "library").replace(output)
    except subprocess.CalledProcessError as error:
        what = f"{shlex.join(error.cmd)}\n{error.stderr}"
        warn(f"{library.output} could not be compiled; {library.does_without} does its work.\n{what}")
        return False
    except OSError as error:
        warn(f"{library.output} could not be compiled; {library.does_without} does its work: {error}")
        return False
    return True


def _call(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _options(compiler: list[str], variant: Variant, folder: Path) -> list[str] | None:
    """Finds the spelling that the compiler knows, on a file that only looks at what the options define."""
    probe = folder / "probe.c"
    probe.write_text(f"#if !({variant.condition})\n#error no {variant.name}\n#endif\nint probe;\n")
    for spelling in variant.spellings:
        options = [*spelling, *variant.defines]
        command = [*compiler, *options, "-c", "-o", str(probe.with_suffix(".o")), str(probe)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return options
    return None


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the libraries into wheels and names the platform that they are for."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, before files are collected."""
        if self.target_name != "wheel":
            return
        outputs = compile_all(Path(self.root), self.app.display_warning)
        if not outputs:
            return
        # Any Python 3, since ctypes loads them.
        platform = os.environ.get(PLATFORM) or _own_platform()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].extend(f"/{output}" for output in outputs)


def _own_platform() -> str:
    from packaging.tags import platform_tags

    # Not "manylinux", which promises an old libc.
    return next(tag for tag in platform_tags() if "linux_" not in tag or tag.startswith("linux_"))


if __name__ == "__main__":
    compiled = compile_all(Path(__file__).parent, lambda text: print(f"ebbflow: {text}", file=sys.stderr))
    sys.exit(len(compiled) < len(LIBRARIES) and find_compiler() is not None)
