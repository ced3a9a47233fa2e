"""How a device that knows only a token's pin gets the certificate of the right authority."""

import hashlib
import hmac
import socket
import ssl
from typing import Any

from ebbflow.common.errors import EbbflowError, Reason


def fetch_authority(address: str, sha256: str, timeout_s: float = 10.0) -> bytes:
    """Reads the certificates that a server presents and returns the one that a token pins.

    Nothing is sent to the server, and nothing that it presents is trusted but what has the pinned hash; whether the
    server holds the key that goes with it shows when a channel is opened with the result as its only authority.

    Args:
        address: host:port of the enrolment listener.
        sha256: hexadecimal SHA-256 of the authority's certificate in DER.
        timeout_s: longest wait for the network.

    Returns:
        The authority's certificate, PEM.

    Raises:
        EbbflowError: SERVER_UNAVAILABLE, or AUTHORITY_MISMATCH if no presented certificate has the hash.
    """
    for der in _presented_chain(address, timeout_s):
        if hmac.compare_digest(hashlib.sha256(der).hexdigest(), sha256):
            return ssl.DER_cert_to_PEM_cert(der).encode()
    message = f"the server at {address} does not belong to the authority that the token names"
    raise EbbflowError(Reason.AUTHORITY_MISMATCH, message, address=address)


def _presented_chain(address: str, timeout_s: float) -> list[bytes]:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the caller compares hashes instead
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            return _chain(connection)
    except ssl.SSLError as error:
        message = f"the server at {address} does not speak TLS"
        raise EbbflowError(Reason.AUTHORITY_MISMATCH, message, address=address) from error
    except (OSError, ValueError, OverflowError) as error:
        raise EbbflowError(Reason.SERVER_UNAVAILABLE, f"no answer from {address}", address=address) from error


def _chain(connection: ssl.SSLSocket) -> list[bytes]:
    if hasattr(connection, "get_unverified_chain"):  # Python 3.13 and later
        return list(connection.get_unverified_chain())
    internal: Any = connection._sslobj  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in internal.get_unverified_chain()]
