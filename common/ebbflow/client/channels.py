"""Channels: one for each process and server, shared by all stubs."""

import grpc

from ebbflow.client.endpoint import Endpoint
from ebbflow.client.interceptors import Deadlines, SyncCalls, aio_interceptors
from ebbflow.common.rpc.options import ChannelOptions

STREAMS = tuple(
    f"ebbflow.api.v1.{method}"
    for method in (
        "AgentService/Connect",
        "ArtefactService/ReadBlob",
        "ArtefactService/ReadMetadata",
        "ArtefactService/WriteBlob",
        "DistillationService/WatchDistillation",
        "InferenceService/Generate",
        "RolloutService/WatchRollout",
    )
)
"""Every method that streams. gRPC does not repeat them; whoever calls one begins again, where it was if that can be.

In grpcio 1.85.1 a line that breaks while gRPC repeats a stream may make a synchronous stream of answers wait for ever,
whatever its deadline and `cancel` say, and an upload abort the process.
"""


def channel(
    endpoint: Endpoint, options: ChannelOptions | None = None, deadlines: Deadlines | None = None
) -> grpc.aio.Channel:
    """Makes an asynchronous channel, whose calls have deadlines and raise `EbbflowError`.

    A channel never reads certificates again: make another one when they were renewed, and close the old one when its
    calls have ended.
    """
    return grpc.aio.secure_channel(
        endpoint.address,
        endpoint.credentials(),
        options=(options or ChannelOptions()).pairs(STREAMS),
        interceptors=aio_interceptors(endpoint.address, deadlines or Deadlines()),
    )


def sync_channel(
    endpoint: Endpoint, options: ChannelOptions | None = None, deadlines: Deadlines | None = None
) -> grpc.Channel:
    """Makes a synchronous channel, whose calls have deadlines and raise `EbbflowError`."""
    pairs = (options or ChannelOptions()).pairs(STREAMS)
    plain = grpc.secure_channel(endpoint.address, endpoint.credentials(), options=pairs)
    return grpc.intercept_channel(plain, SyncCalls(endpoint.address, deadlines or Deadlines()))
