"""Settings of gRPC channels and servers, by name and unit.

gRPC ignores option names that it does not know, so their spelling lives here only.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

Options = list[tuple[str, int | str]]

MESSAGE_BYTES = 4 * 1024 * 1024
"""Longest message; anything longer travels as a stream of chunks."""


@dataclass(frozen=True, kw_only=True)
class RetryOptions:
    """When a call is repeated: only if the server was not there."""

    attempts: int = 4
    """Tries in all, 5 at most."""
    initial_backoff_s: float = 0.2
    """Longest wait before the second try; each wait is drawn at random below its bound."""
    max_backoff_s: float = 2.0
    """Bound of the longest wait."""

    def service_config(self, once: Iterable[str] = ()) -> str:
        """Returns gRPC's service config (gRFC A6). Deadlines are not in it: from there they never reach the server.

        Args:
            once: methods that are not repeated, such as "ebbflow.api.v1.ArtefactService/ReadBlob".
        """
        policy = {
            "maxAttempts": self.attempts,
            "initialBackoff": f"{self.initial_backoff_s}s",
            "maxBackoff": f"{self.max_backoff_s}s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        methods: list[dict[str, object]] = [{"name": [{}], "retryPolicy": policy}]
        if names := [dict(zip(("service", "method"), name.split("/"), strict=True)) for name in once]:
            methods.append({"name": names})
        return json.dumps({"methodConfig": methods, "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.5}})


@dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """How a client keeps its connection."""

    keepalive_s: float = 60.0
    """Time without traffic after which the connection is tried."""
    keepalive_timeout_s: float = 20.0
    """Time after which a connection that does not answer is given up."""
    max_reconnect_backoff_s: float = 30.0
    """Longest wait between attempts to connect."""
    retry: RetryOptions = RetryOptions()
    """When calls are repeated."""
    read_ahead_bytes: int = 0
    """Bytes of a call that may arrive before anybody reads them; 0 leaves it to gRPC, which asks for more on a fast
    link."""

    def pairs(self, once: Iterable[str] = ()) -> Options:
        """Returns gRPC's channel options.

        Args:
            once: methods that are not repeated: see `RetryOptions.service_config`.
        """
        bounded: Options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", self.read_ahead_bytes)]
        return [
            *(bounded if self.read_ahead_bytes else []),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.min_reconnect_backoff_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", int(self.max_reconnect_backoff_s * 1000)),
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.enable_retries", 1),
            ("grpc.service_config", self.retry.service_config(once)),
        ]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server keeps its connections."""

    min_ping_interval_s: float = 30.0
    """Clients that ping more often are disconnected; must stay below the clients' `keepalive_s`."""
    max_connection_age_s: float = 1800.0
    """Age at which a connection is asked to go, so that certificates and load spread again."""
    max_connection_age_grace_s: float = 300.0
    """Time that its running calls then still have."""

    def pairs(self) -> Options:
        """Returns gRPC's server options."""
        return [
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.min_ping_interval_s * 1000)),
            ("grpc.http2.max_ping_strikes", 2),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_connection_age_ms", int(self.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(self.max_connection_age_grace_s * 1000)),
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            # Otherwise a second server on the same port starts without an error and gets half of the calls.
            ("grpc.so_reuseport", 0),
        ]
