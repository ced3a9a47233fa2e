"""Work of minutes that everything else on the device goes before."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ebbflow.common.errors import EbbflowError, Reason

_LOWEST_PRIORITY = 19
_Found = TypeVar("_Found")


class Halt:
    """Ends work of minutes from another thread. The work has to ask, often enough."""

    def __init__(self) -> None:
        self._called = threading.Event()

    def call(self) -> None:
        """Ends the work when it asks next."""
        self._called.set()

    def check(self) -> None:
        """Does nothing, unless the work is to end.

        Raises:
            EbbflowError: AGENT_STOPPING.
        """
        if self._called.is_set():
            raise EbbflowError(Reason.AGENT_STOPPING, "the agent ends, and this waits until it runs again")


def in_background(job: Callable[[], _Found]) -> _Found:
    """Runs a job in a thread of its own at the lowest priority, and waits for it."""

    def step_back() -> None:
        if sys.platform == "linux":  # elsewhere the number is that of a whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)

    with ThreadPoolExecutor(1, thread_name_prefix="background", initializer=step_back) as executor:
        return executor.submit(job).result()
