"""Channels to the cloud that follow the agent's certificate."""

import asyncio

import grpc

from ebbflow.api.v1 import agent_pb2_grpc, feedback_pb2_grpc
from ebbflow.api.v1 import enrolment_pb2 as pb
from ebbflow.client.channels import channel, sync_channel
from ebbflow.common.rpc.options import ChannelOptions
from ebbflow.edge.agent.credentials import CredentialFiles, Credentials
from ebbflow.edge.delivery.fetcher import ArtefactSource

_OLD_CALLS_S = 3600.0


class Cloud:
    """The cloud as this agent reaches it. A channel never reads certificates again, so a renewal makes new ones.

    Attributes:
        credentials: who this agent is now.
        source: reads artefacts, from any thread.
        renewed: set whenever the certificate has changed; whoever holds a long stream opens it anew.
    """

    def __init__(self, files: CredentialFiles, read_ahead_bytes: int = 0) -> None:
        """Opens channels, on the running event loop; nothing is sent yet.

        Args:
            files: who this agent is.
            read_ahead_bytes: most bytes of an artefact to receive before they are read, for agents that limit their
                bandwidth; 0 for as many as are fast.

        Raises:
            EbbflowError: NOT_ENROLLED or FILE_CORRUPT.
        """
        self._files = files
        self._artefacts = ChannelOptions(read_ahead_bytes=read_ahead_bytes)
        self.credentials: Credentials = files.load()
        self._open()
        self._old_sync: grpc.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.source = ArtefactSource(self._sync)
        self.renewed = asyncio.Event()

    def _open(self) -> None:
        self._channel = channel(self.credentials.cloud)
        self._sync = sync_channel(self.credentials.cloud, self._artefacts)
        self.agent = agent_pb2_grpc.AgentServiceStub(self._channel)
        self.feedback = feedback_pb2_grpc.FeedbackServiceStub(self._channel)

    async def adopt(self, answer: pb.Credentials) -> None:
        """Stores a new certificate and uses it from now on; running calls end on the old channels."""
        old, old_sync = self._channel, self._sync
        self.credentials = await asyncio.to_thread(self._files.renewed, answer)
        self._open()
        self.source.use(self._sync)
        closing = asyncio.create_task(old.close(_OLD_CALLS_S))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        if self._old_sync:  # its downloads have had a whole certificate's lifetime
            self._old_sync.close()
        self._old_sync = old_sync
        self.renewed.set()

    async def close(self) -> None:
        """Closes all channels; running calls fail."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close()
        for sync in filter(None, (self._sync, self._old_sync)):
            sync.close()
