"""Deltas for those who call: what is ready in time, and what the rollouts that run will be asked for."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import sqlalchemy as sa

from ebbflow.cloud.registry.tables import Rollout, RolloutState
from ebbflow.cloud.release import deltas, neighbours
from ebbflow.cloud.release.deltas import Found, Pair
from ebbflow.cloud.services.cloud import Cloud

MOST_WAIT_S = 60.0
"""Longest that a call waits for builds, whatever its deadline; they go on without it."""
ANSWER_S = 0.5
"""What is left of a call's deadline for the way back."""


def time_left_s(context: "grpc.aio.ServicerContext[Any, Any]") -> float:
    """How long a call may wait."""
    left_s: float | None = context.time_remaining()  # None without a deadline, whatever the stubs say
    return MOST_WAIT_S if left_s is None else max(0.0, min(MOST_WAIT_S, left_s - ANSWER_S))


async def wait_for(cloud: Cloud, pairs: Sequence[Pair], limit_s: float) -> "list[asyncio.Future[Found]]":
    """Waits until all pairs are built, or no longer than `limit_s`; what has begun goes on for the next who asks.

    Returns:
        A future for each pair, in order; see `DeltaBuilder.begin`.
    """
    if not pairs:
        return []
    remembered = await cloud.read(lambda session: deltas.known(session, pairs))
    building = await cloud.in_thread(cloud.files, lambda: cloud.deltas.begin(pairs, remembered))
    futures = [asyncio.wrap_future(future) for future in building]
    await asyncio.wait(futures, timeout=limit_s)
    return futures


def useful(futures: "Sequence[asyncio.Future[Found]]") -> list[Found]:
    """What is built and shorter than the full file, shortest first; whatever failed is not there."""
    done = [future for future in futures if future.done() and not future.cancelled()]
    found = [future.result() for future in done if future.exception() is None]
    return sorted((one for one in found if one.sha256 is not None), key=lambda one: one.size_bytes)


def prepare(cloud: Cloud) -> None:
    """Begins to build what the devices of running rollouts will ask for. Waits for nothing."""
    with cloud.registry.reading() as session:
        running = session.scalars(sa.select(Rollout).where(Rollout.state == RolloutState.RUNNING))
        pairs = [pair for rollout in running for pair in neighbours.pairs_of_rollout(session, rollout)]
        remembered = deltas.known(session, pairs) if pairs else {}
    cloud.deltas.begin([pair for pair in pairs if pair not in remembered], {})
