"""What the control plane does by itself: rollouts move, releases are published, rounds end, what is stale goes."""

import asyncio
import datetime as dt
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ebbflow.cloud.distillation import private_texts
from ebbflow.cloud.feedback import retention, rounds
from ebbflow.cloud.registry import answers, clock
from ebbflow.cloud.release import publish, standing, withdraw
from ebbflow.cloud.rollout import store
from ebbflow.cloud.services import deltas, presence
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.faults import describe
from ebbflow.cloud.services.hub import Hub
from ebbflow.cloud.services.trust import own_keys
from ebbflow.common.errors import EbbflowError

_log = logging.getLogger(__name__)

ANSWERS_KEPT = dt.timedelta(days=7)
"""How long a request_id is remembered."""
DELTAS_EVERY = dt.timedelta(seconds=2)
"""So often that the first device of a rollout finds its delta built, or being built."""
SLOW_JOBS_EVERY = dt.timedelta(seconds=10)
WARNINGS_EVERY = dt.timedelta(days=1)
FORGET_EVERY = dt.timedelta(hours=1)
UPLOAD_LASTS = dt.timedelta(days=1)
"""What is left of an upload that broke off may be of private texts too; one that runs is younger."""


@dataclass(frozen=True)
class Job:
    """One thing to do now and then. Correct on any replica, at any time, any number of times."""

    name: str
    act: Callable[[dt.datetime], bool | int]
    """Does it; true if agents should be told to look."""
    every: dt.timedelta = dt.timedelta(0)
    """Least time between two turns; zero means every tick."""


class Ticker:
    """Runs the jobs one after the other. One that fails is logged and tried again; the others go on."""

    def __init__(self, cloud: Cloud, hub: Hub, jobs: Sequence[Job] = ()) -> None:
        self._cloud = cloud
        self._hub = hub
        self._jobs = jobs or jobs_of(cloud)
        self._due: dict[str, dt.datetime] = {}

    async def run(self, interval_s: float) -> None:
        """Ticks until cancelled."""
        while True:
            await self.tick(clock.now())
            await asyncio.sleep(interval_s)

    async def tick(self, now: dt.datetime) -> None:
        """Runs what is due."""
        for job in self._jobs:
            due = self._due.get(job.name, now)
            if now >= due or due > now + job.every:  # later than it can be: the clock was set back
                self._due[job.name] = now + job.every
                await self._run(job, now)

    async def _run(self, job: Job, now: dt.datetime) -> None:
        try:
            if await self._cloud.in_thread(self._cloud.sql, lambda: job.act(now)):
                self._hub.nudge()
        except EbbflowError as error:
            _log.warning("%s has to wait: %s (%s)", job.name, error, error.reason.name)
        except Exception as error:  # noqa: BLE001 - the tick must outlive what is wrong with one job
            _log.error("%s failed: %s", job.name, describe(error))


def jobs_of(cloud: Cloud) -> list[Job]:
    """Everything that a control plane does by itself."""
    registry = cloud.registry
    kept = dt.timedelta(days=cloud.settings.private_texts_days)
    forgetter = private_texts.Forgetter(registry, cloud.blobs, kept)

    def publish_releases(now: dt.datetime) -> bool:
        with registry.transaction() as session:
            return publish.publish(session, cloud.online_signer, now)

    def sign_again(now: dt.datetime) -> bool:
        with registry.transaction() as session:
            publish.refresh_online(session, cloud.online_signer, now)
        return False

    def retire(_now: dt.datetime) -> bool:
        with registry.transaction() as session:
            withdraw.retire(session)
        return False

    def warn(now: dt.datetime) -> bool:
        with registry.reading() as session:
            for role in standing.standing(session, own_keys(cloud), now):
                if role.action:
                    _log.warning("the %s signatures need somebody: %s", role.role, role.action)
        return False

    def build_deltas(_now: dt.datetime) -> bool:
        deltas.prepare(cloud)
        return False

    def close_rounds(now: dt.datetime) -> bool:
        return bool(rounds.close_overdue(registry, now, cloud.blobs))

    def forget(now: dt.datetime) -> bool:
        retention.forget(registry, cloud.blobs, now)
        return False

    def forget_texts(now: dt.datetime) -> bool:
        forgetter.forget(now)
        return False

    def sweep_uploads(now: dt.datetime) -> bool:
        cloud.blobs.sweep(now - UPLOAD_LASTS)
        return False

    def sweep(now: dt.datetime) -> bool:
        with registry.transaction() as session:
            presence.drop_stale(session, now, cloud.settings.heartbeat_interval_s)
            answers.forget(session, now - ANSWERS_KEPT)
        return False

    return [
        Job("moving rollouts", lambda now: store.tick(registry, now)),
        Job("building deltas", build_deltas, DELTAS_EVERY),
        Job("publishing releases", publish_releases),
        Job("closing rounds", close_rounds),
        Job("signing metadata again", sign_again, SLOW_JOBS_EVERY),
        Job("looking at signatures", warn, WARNINGS_EVERY),
        Job("retiring releases", retire, SLOW_JOBS_EVERY),
        Job("sweeping", sweep, SLOW_JOBS_EVERY),
        Job("forgetting old batches", forget, FORGET_EVERY),
        Job("forgetting private texts", forget_texts, SLOW_JOBS_EVERY),
        Job("sweeping broken uploads", sweep_uploads, FORGET_EVERY),
    ]
