"""Streams a resource each time it changes, until it has ended."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from google.protobuf.message import Message
from sqlalchemy.orm import Session

from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.errors import EbbflowError, Reason

POLL_S = 0.5

Kind = TypeVar("Kind", bound=Message)


async def changes(cloud: Cloud, read: Callable[[Session], Kind], ended: Callable[[Kind], bool]) -> AsyncIterator[Kind]:
    """Yields what `read` returns when it differs from what was yielded last; stops after one that has ended.

    Raises:
        EbbflowError: SERVER_UNAVAILABLE when this replica ends before.
    """
    last = None
    while True:
        now = await cloud.read(read)
        if now != last:
            yield now
            last = now
        if ended(now):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await cloud.draining.wait()
            raise EbbflowError(Reason.SERVER_UNAVAILABLE, "this replica is about to end; watch again")
