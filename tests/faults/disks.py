"""Carries small programs out on simulated disks."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from deploy_world import environment as environment_of

SCRIPT = """
import ctypes, json, os, sys
disks, before, orders = json.loads(sys.argv[1]), *sys.argv[2:]
exec(before)
for disk in disks:
    child = os.fork()
    if not child:
        ctypes.CDLL(None).faults_arm(*(ctypes.c_char_p(path.encode()) for path in disk))
        os.chdir(disk[2])
        exec(orders)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
FIELDS = ("operations", "kill_at", "kinds", "after", "times", "errno", "space", "clock")
CUTS = 24


def act(
    folders: list[Path],
    shim: Path,
    orders: str,
    control: Mapping[str, int] | Sequence[Mapping[str, int]] = MappingProxyType({}),
    before: str = "",
) -> list[int]:
    """Carries the same orders out on many disks; returns how each process ended.

    Args:
        folders: one for each disk: its files are in `files`, where some may be already.
        shim: the compiled shim.
        orders: Python, carried out in `files`.
        control: fields of the control block, or those of each disk.
        before: Python that runs once and before the disks are there, such as imports.
    """
    disks = [[folder / name for name in ("control", "journal", "files", "shadows")] for folder in folders]
    controls = [control] * len(folders) if isinstance(control, Mapping) else control
    for (block, _, *made), fields in zip(disks, controls, strict=True):
        for folder in made:
            folder.mkdir(parents=True, exist_ok=True)
        values = [fields.get(field, -1 if field == "space" else 0) for field in FIELDS]
        block.write_bytes(b"".join(value.to_bytes(8, "little", signed=True) for value in values))
    words = json.dumps([[str(path) for path in disk] for disk in disks])
    environment = environment_of({"LD_PRELOAD": str(shim)})
    command = [sys.executable, "-c", SCRIPT, words, before, orders]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]
