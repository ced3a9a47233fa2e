"""The one place where a command's failure becomes text and an exit code."""

import os
import sys
import traceback
from collections.abc import Callable

from ebbflow.common.errors import EbbflowError


def run(command: Callable[[], object]) -> None:
    """Runs a command line to its end.

    What is known to go wrong is told with its cure on standard error and ends with the catalogue's exit code; anything
    else ends with 1, and its place in the code is shown if EBBFLOW_DEBUG is set.
    """
    try:
        command()
    except EbbflowError as error:
        print(f"error: {error}\ncure: {error.cure}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain while flushing at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # noqa: BLE001 - a person gets one line, not a traceback
        if os.environ.get("EBBFLOW_DEBUG"):
            traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}: {error}", file=sys.stderr)
        print("cure: Set EBBFLOW_DEBUG=1 to see where, and report it.", file=sys.stderr)
        sys.exit(1)
