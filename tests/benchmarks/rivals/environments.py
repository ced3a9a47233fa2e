"""Virtual environments for rivals: each has its own, kept between runs, and none is the project's."""

import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def folder() -> Path:
    """Where the environments are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ebbflow-benchmarks"


def python(name: str, requirements: Sequence[str], *options: str) -> Path:
    """Returns the interpreter of an environment that holds exactly these requirements; makes it if it is not there.

    Args:
        name: Name of the rival.
        requirements: What pip installs.
        options: Further options of `pip install`.

    Raises:
        subprocess.CalledProcessError: If pip cannot install them.
    """
    wanted = hashlib.sha256("\n".join([sys.version, *requirements, *options]).encode()).hexdigest()[:12]
    home = folder() / f"{name}-{wanted}"
    interpreter, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        print(f"installing {name} into {home}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        command = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
        subprocess.run([*command, *requirements], check=True, stdout=sys.stderr)
        done.touch()
    return interpreter
