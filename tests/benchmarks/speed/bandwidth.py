"""How fast this machine reads memory: the bound of a decoder that reads all weights for every token."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from rivals import environments

_SOURCE = Path(__file__).with_name("read.c")


def read_gb_s(threads: int) -> float | None:
    """Measures it with `read.c`, in 10^9 bytes per second; None where no C compiler is."""
    if (program := _compiled()) is None:
        return None
    said = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout
    return float(said.split()[0])


def _compiled() -> Path | None:
    wanted = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    program = environments.folder() / f"read-{wanted}"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not program.exists():
        if compiler is None:
            print("no C compiler: the memory's bandwidth is not measured", file=sys.stderr, flush=True)
            return None
        program.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, "-O3", "-march=native", "-pthread", "-o", program, _SOURCE], check=True)
    return program
