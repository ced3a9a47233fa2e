#!/bin/sh
# Builds the wheel and runs both command lines from it, in an environment and a folder of their own.
set -eu
python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --quiet --wheel --outdir "$work/dist" .
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/ebbflow" --version
"$work/venv/bin/ebbflow" --help >/dev/null
"$work/venv/bin/ebbflow-edge" --help >/dev/null
"$work/venv/bin/python" - <<'PY'
import importlib.util
import sys
from importlib.metadata import files

names = {file.parts[0] for file in files("ebbflow") or [] if not file.parts[0].startswith("..")}
assert names <= {"ebbflow", *[n for n in names if n.endswith(".dist-info")]}, names
assert importlib.util.find_spec("ebbflow").origin is None, "ebbflow must stay a namespace"
for heavy in ("torch", "sqlalchemy"):
    assert importlib.util.find_spec(heavy) is None, f"the base installation brings {heavy}"
import ebbflow.cli.main
from ebbflow.api.v1 import agent_pb2
print("the wheel works from an empty folder:", sorted(names))
PY
