"""What became of releases on this device, and telling the cloud of it until it has heard."""

import datetime as dt
from collections.abc import Callable

from ebbflow.api.v1 import agent_pb2
from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.cloud import Cloud


class Installations:
    """The last installation of each student; only the newest news of each is sent."""

    def __init__(self, now: Callable[[], dt.datetime]) -> None:
        """Takes the clock, which returns aware times."""
        self._now = now
        self._last: dict[str, pb.Installation] = {}
        self._rollouts: dict[str, str] = {}
        self._unsent: dict[str, pb.Installation] = {}

    def note(
        self,
        desired: agent_pb2.DesiredRelease,
        state: "pb.InstallationState.ValueType",
        *,
        reason: str = "",
        probe_loss: float = 0.0,
        fetched_bytes: int = 0,
        resume_time: dt.datetime | None = None,
        again: bool = False,
    ) -> None:
        """Notes what became of a release; what its rollout has heard is not sent again, unless it is a sign of life."""
        found = pb.Installation(
            student=desired.student,
            release=desired.release,
            precision=desired.precision,
            state=state,
            reason=reason,
            probe_loss=probe_loss,
            fetched_bytes=fetched_bytes,
        )
        if resume_time is not None:
            found.resume_time.FromDatetime(resume_time)
        known = self._last.get(found.student)
        if not again and known and _same(known, found) and self._rollouts[found.student] == desired.rollout:
            return
        self._rollouts[found.student] = desired.rollout
        found.update_time.FromDatetime(self._now())
        self._last[found.student] = self._unsent[found.student] = found

    def forget(self, student: str) -> None:
        """The student is no longer on this device."""
        self._last.pop(student, None)
        self._unsent.pop(student, None)

    def last(self) -> dict[str, pb.Installation]:
        """The last installation of each student, by its name."""
        return dict(self._last)

    async def send(self, cloud: Cloud) -> None:
        """Tells the cloud what it has not heard yet.

        Raises:
            EbbflowError: why it could not be told; the rest is kept for the next time.
        """
        for student, found in list(self._unsent.items()):
            try:
                await cloud.agent.ReportInstallation(agent_pb2.ReportInstallationRequest(installation=found))
            except EbbflowError as error:
                if error.reason not in {Reason.RELEASE_NOT_FOUND, Reason.STUDENT_NOT_FOUND}:
                    raise  # only what the cloud no longer knows is not worth telling again
            if self._unsent.get(student) is found:
                del self._unsent[student]


def _same(one: pb.Installation, other: pb.Installation) -> bool:
    facts = ("release", "precision", "state", "reason", "resume_time")
    return all(getattr(one, fact) == getattr(other, fact) for fact in facts)
