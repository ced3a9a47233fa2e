"""Channels: one for each process and server, shared by all stubs."""

import grpc

from ebbflow.client.endpoint import Endpoint
from ebbflow.client.interceptors import Deadlines, SyncCalls, aio_interceptors
from ebbflow.common.rpc.options import ChannelOptions


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
        options=(options or ChannelOptions()).pairs(),
        interceptors=aio_interceptors(endpoint.address, deadlines or Deadlines()),
    )


def sync_channel(
    endpoint: Endpoint, options: ChannelOptions | None = None, deadlines: Deadlines | None = None
) -> grpc.Channel:
    """Makes a synchronous channel, whose calls have deadlines and raise `EbbflowError`."""
    plain = grpc.secure_channel(endpoint.address, endpoint.credentials(), options=(options or ChannelOptions()).pairs())
    return grpc.intercept_channel(plain, SyncCalls(endpoint.address, deadlines or Deadlines()))
