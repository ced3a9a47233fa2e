"""llama.cpp as llama-cpp-python brings it: its library, its Python binding and its server, from the same sources.

llama-cpp-python has no wheels, and its own build leaves out the server; so its vendored sources are compiled once by
cmake with the options that it sets itself (Release, the processor's own instructions), and the binding, installed
without its build, gets these libraries. Takes 15 CPU minutes the first time.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from rivals import environments

REQUIREMENT = "llama-cpp-python==0.3.36"
_REQUIREMENTS = (REQUIREMENT, "cmake==4.4.4", "ninja==1.13.2")
_OPTIONS = ("-C", "cmake.define.LLAMA_BUILD=OFF", "-C", "cmake.define.LLAVA_BUILD=OFF")
_DEFINED = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=ON",
    "GGML_NATIVE=ON",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_TOOLS=ON",
    "LLAMA_BUILD_SERVER=ON",
    "LLAMA_USE_PREBUILT_UI=OFF",
    "LLAMA_OPENSSL=OFF",
    "CMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "CMAKE_INSTALL_RPATH=$ORIGIN",
)


def interpreter() -> Path:
    """The interpreter of an environment where `import llama_cpp` works; made the first time.

    Raises:
        subprocess.CalledProcessError, OSError: It could not be installed or built.
    """
    python = environments.python("llama-cpp", _REQUIREMENTS, *_OPTIONS)
    (package,) = python.parent.parent.glob("lib/python*/site-packages/llama_cpp")
    libraries = package / "lib"
    if not libraries.exists():
        built = _built("llama", python)
        libraries.symlink_to(built.parent)
    return python


def server() -> Path:
    """The program `llama-server`, of the same sources.

    Raises:
        subprocess.CalledProcessError, OSError: It could not be installed or built.
    """
    return _built("llama-server", environments.python("llama-cpp", _REQUIREMENTS, *_OPTIONS))


def _built(target: str, python: Path) -> Path:
    home = python.parent.parent
    build = home / "build"
    made = build / "bin" / ("libllama.so" if target == "llama" else target)
    done = build / f"{target}.built"
    if not done.exists():
        print(f"building {target} in {build}", file=sys.stderr, flush=True)
        settings = [f"-D{defined}" for defined in (*_DEFINED, f"CMAKE_MAKE_PROGRAM={python.with_name('ninja')}")]
        cmake = python.with_name("cmake")
        _run(cmake, "-S", _sources(python), "-B", build, "-G", "Ninja", *settings)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        _run(cmake, "--build", build, "--parallel", jobs, "--target", target)
        done.touch()
    return made


def _sources(python: Path) -> Path:
    sources = python.parent.parent / "sources"
    if not sources.exists():
        options = ["--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        with tempfile.TemporaryDirectory(dir=sources.parent) as name:
            _run(python, "-m", "pip", "download", *options, "--dest", name, REQUIREMENT)
            (archive,) = Path(name).glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(name, filter="data")
            archive.with_name(archive.name.removesuffix(".tar.gz")).rename(sources)
    return sources / "vendor" / "llama.cpp"


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
