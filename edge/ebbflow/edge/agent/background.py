"""Work of minutes that everything else on the device goes before."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_LOWEST_PRIORITY = 19
_Found = TypeVar("_Found")


def in_background(job: Callable[[], _Found]) -> _Found:
    """Runs a job in a thread of its own at the lowest priority, and waits for it."""

    def step_back() -> None:
        if sys.platform == "linux":  # elsewhere the number is that of a whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)

    with ThreadPoolExecutor(1, thread_name_prefix="feedback", initializer=step_back) as executor:
        return executor.submit(job).result()
