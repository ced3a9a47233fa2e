"""Following a rollout to its end."""

import datetime as dt
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ebbflow.cli import rollout_view
from ebbflow.cli.output import print_json_line, say
from ebbflow.cli.rollout_print import state_of
from ebbflow.cli.watching import WATCH_S, attend
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from ebbflow.client.admin import AdminClient


def follow(client: "AdminClient", name: str, *, each_as_json: bool = False) -> Any:
    """Shows a rollout until it has ended or halted, and returns its last state.

    Args:
        client: the cloud.
        name: resource name.
        each_as_json: print each state as JSON on standard output instead of showing it on standard error.

    Raises:
        EbbflowError: the server's, or SERVER_UNAVAILABLE when it stayed away.
    """
    from ebbflow.api.v1.rollout_pb2 import WatchRolloutRequest

    def stream() -> Iterator[Any]:
        for answer in client.rollouts.WatchRollout(WatchRolloutRequest(name=name), timeout=WATCH_S):
            yield answer.rollout

    try:
        # A halted rollout stays so until somebody acts: nobody should wait for that.
        with _display(each_as_json=each_as_json) as show:
            return attend(stream, show, lambda rollout: state_of(rollout) in rollout_view.ENDED)
    except KeyboardInterrupt:
        short = name.removeprefix("rollouts/")
        say(f"{name} goes on without you; `ebbflow rollout watch {short}` shows it again")
        raise


def check(rollout: Any) -> None:
    """Ends the command with the right exit code.

    Raises:
        EbbflowError: STATE_CONFLICT, exit code 5, unless the rollout succeeded.
    """
    if (state := state_of(rollout)) != "succeeded":
        message = f"{rollout.name} {state}" + (f": {rollout.reason}" if rollout.reason else "")
        raise EbbflowError(Reason.STATE_CONFLICT, message, name=rollout.name)


@contextmanager
def _display(*, each_as_json: bool) -> Iterator[Callable[[Any], object]]:
    if each_as_json:
        yield print_json_line
    elif sys.stderr.isatty():
        from rich.console import Console

        from ebbflow.cli.rollout_screen import live

        with live(Console(stderr=True)) as show:
            yield show
    else:
        yield ChangedLines().show


class ChangedLines:
    """Plain lines: one for each change."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, rollout: Any) -> None:
        """Prints the rollout's line if it says something new."""
        line = rollout_view.line(rollout_view.view(rollout, dt.datetime.now(dt.UTC)))
        if line != self._last:
            self._last = line
            say(line)
