#!/bin/sh
# Makes the virtual environment that the Makefile's targets run in. Says what is missing and how to get it.
set -eu
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv} EXTRAS=${EXTRAS:-cloud,edge-torch,postgres,s3,dev}

fail() { echo "ebbflow: $1" >&2; exit 1; }

command -v "$PYTHON" >/dev/null 2>&1 || fail "no $PYTHON here. Install Python 3.11 or newer, or say make PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed. Say make PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$("$PYTHON" --version) has no venv module. On Debian and Ubuntu: apt-get install python3-venv"

echo "Installing into $VENV (the first time takes a minute or two; torch is large) ..."
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch's CPU build spares gigabytes of CUDA libraries. Take it if pip knows one already, or if PyTorch's own index answers
# within three seconds; otherwise take what the package index has.
torch=$(sed -n 's/^torch==//p' constraints.txt)
extra=
if ! pip install --quiet --dry-run --no-deps "torch==$torch+cpu" >/dev/null 2>&1; then
    index=https://download.pytorch.org/whl/cpu
    "$VENV/bin/python" -c "import urllib.request as r; r.urlopen('$index/torch/', timeout=3)" 2>/dev/null &&
        extra="--extra-index-url $index"
fi
# shellcheck disable=SC2086
pip install --quiet --constraint constraints.txt $extra --editable ".[$EXTRAS]" ||
    fail "the installation failed; the lines above say why. Behind a proxy set HTTPS_PROXY, or PIP_INDEX_URL for a mirror."
