"""The cloud's teacher as this agent reaches it: with its own certificate, for questions whose users agreed."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import grpc

from ebbflow.api.v1 import teacher_pb2 as pb
from ebbflow.api.v1.teacher_pb2_grpc import TeacherServiceStub
from ebbflow.client.channels import channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.common import names
from ebbflow.common.rpc.options import ChannelOptions, RetryOptions
from ebbflow.edge.agent.credentials import Credentials
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.delivery.install import Installer
from ebbflow.edge.serving.escalation import Escalation, EscalationLimits

if TYPE_CHECKING:
    from ebbflow.api.v1.teacher_pb2_grpc import TeacherServiceAsyncStub  # exists in the stubs alone

_OLD_CALLS_S = 60.0
# A user waits: the student's answer is better than a second try.
_OPTIONS = ChannelOptions(retry=RetryOptions(attempts=2))


class Teacher:
    """Calls the teacher's service. A channel is opened with the first question, and anew for a new certificate."""

    def __init__(self, address: str, credentials: Callable[[], Credentials]) -> None:
        """Takes host:port of `ebbflow cloud teach`, and who this agent is now; nothing is opened yet."""
        self._address, self._credentials = address, credentials
        self._used: Credentials | None = None
        self._channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def allowed(self, student: str) -> bool:
        """Whether an owner allows this agent to escalate questions of a student.

        Raises:
            EbbflowError: why the cloud could not be asked.
        """
        answer = await self._stub().GetEscalation(pb.GetEscalationRequest(student=student))
        return answer.allowed

    async def answer(self, request: pb.EscalateRequest, timeout_s: float) -> pb.EscalateResponse:
        """Asks the teacher.

        Raises:
            EbbflowError: why there is no answer.
        """
        return await self._stub().Escalate(request, timeout=timeout_s)

    async def close(self) -> None:
        """Closes what is open; running calls fail."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        if self._channel:
            await self._channel.close()

    def _stub(self) -> "TeacherServiceAsyncStub":
        now = self._credentials()
        if self._channel is None or now is not self._used:
            self._retire()
            endpoint = Endpoint(self._address, now.authority_pem, now.certificate_pem, now.key_pem)
            self._used, self._channel = now, channel(endpoint, _OPTIONS)
        return TeacherServiceStub(self._channel)

    def _retire(self) -> None:
        if self._channel:
            closing = asyncio.create_task(self._channel.close(_OLD_CALLS_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


def escalation_of(settings: AgentSettings, teacher: Teacher, installer: Installer) -> Escalation | None:
    """Returns the way for hard questions; None if the device's operator allows it for no student."""
    if not settings.escalate:
        return None
    limits = EscalationLimits(
        students=frozenset(names.make("students", student_id) for student_id in settings.escalate),
        confidence=settings.escalate_below,
        most=settings.escalate_most,
        window_s=settings.escalate_window_s,
        timeout_s=settings.escalate_timeout_s,
    )
    return Escalation(teacher, limits, partial(_held_out, installer))


def _held_out(installer: Installer, student: str) -> Sequence[Sequence[int]]:
    """The probe of the release: texts that are signed with it and that it was not trained on."""
    installed = installer.current(names.parse(student, "students"))
    return installed.manifest.probe.token_ids if installed else ()
