"""Runs one of the cloud's processes as a child of `cloud serve`, and ends with it, however it ends.

Linux tells the child when its parent is gone; elsewhere an orphan runs on until it is stopped by hand.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Reads "PARENT_PID ARGUMENT..." and becomes `ebbflow ARGUMENT...`."""
    parent, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        return  # the parent went before it could be watched
    from ebbflow.cli.main import main as command_line

    sys.argv = ["ebbflow", *arguments]
    command_line()


if __name__ == "__main__":
    main()
