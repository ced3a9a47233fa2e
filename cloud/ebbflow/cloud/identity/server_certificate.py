"""The certificate of a listener; makes the next one by itself before it expires."""

import datetime as dt
import logging
from collections.abc import Iterable
from typing import Any

import grpc

from ebbflow.cloud.identity.authority import Authority

_log = logging.getLogger(__name__)


class ServerCertificate:
    """A key and a certificate by the authority, looked up at every handshake."""

    def __init__(self, authority: Authority, hosts: Iterable[str], lifetime: dt.timedelta) -> None:
        """Makes the first one.

        Args:
            authority: who signs.
            hosts: names and addresses under which clients reach the listener; empty ones and repetitions are left out.
            lifetime: of each certificate.
        """
        self._authority = authority
        self._hosts = list(dict.fromkeys(host for host in hosts if host))
        self._lifetime = lifetime
        self._renew_time = dt.datetime.now(dt.UTC)
        self._current = self.fetch()

    def credentials(self, *, client_certificates: bool) -> grpc.ServerCredentials:
        """Returns credentials for a listener.

        A listener that asks for client certificates lets nobody in whose certificate the authority has not signed.
        """
        fetch = self._fetch_main if client_certificates else self._fetch_open
        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            fetch(), fetch, require_client_authentication=client_certificates
        )
        return credentials

    def fetch(self) -> tuple[bytes, bytes]:
        """Key and chain to present now, PEM."""
        now = dt.datetime.now(dt.UTC)
        if now >= self._renew_time:
            self._current = self._authority.issue_server(self._hosts, self._lifetime, now)
            self._renew_time = now + self._lifetime * 2 / 3
            _log.info("made a server certificate for %s", ", ".join(self._hosts))
        return self._current

    def _fetch_main(self) -> Any:
        return grpc.ssl_server_certificate_configuration(
            [self.fetch()], root_certificates=self._authority.certificate_pem
        )

    def _fetch_open(self) -> Any:
        return grpc.ssl_server_certificate_configuration([self.fetch()])
