"""Compile protos/ into common/ebbflow/api. `make proto` writes; `--check`, in `make lint`, fails on a difference."""

import filecmp
import os
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS, OUT = ROOT / "protos", ROOT / "common"


def generate(out: Path) -> None:
    """Wipes the generated package below `out` and makes it anew."""
    api = out / "ebbflow" / "api"
    shutil.rmtree(api, ignore_errors=True)
    # protoc looks for the mypy plug-ins on PATH only.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    protos = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    outputs = [f"--{kind}_out=quiet:{out}" if "mypy" in kind else f"--{kind}_out={out}" for kind in KINDS]
    includes = [f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
    if code := protoc.main(["protoc", *includes, *outputs, *protos]):
        sys.exit(int(code))
    for folder in [api, *(path for path in api.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()
    (api / "py.typed").touch()


KINDS = ("python", "grpc_python", "mypy", "mypy_grpc")


def differences(left: Path, right: Path) -> list[str]:
    """Names of generated files that differ between two folders or stand in one of them only."""
    names = {path.relative_to(base) for base in (left, right) for path in base.rglob("*.py*") if path.suffix != ".pyc"}
    pairs = [(left / name, right / name, str(name)) for name in names]
    return sorted(n for a, b, n in pairs if not (a.exists() and b.exists() and filecmp.cmp(a, b, shallow=False)))


def main() -> int:
    """Generates, or checks that what is committed is what would be generated."""
    if "--check" not in sys.argv:
        generate(OUT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ebbflow").mkdir()
        generate(Path(folder))
        stale = differences(OUT / "ebbflow" / "api", Path(folder) / "ebbflow" / "api")
    if stale:
        print(f"generated code is stale, run `make proto`: {', '.join(stale)}", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
