"""Where a server is, whom to trust there, and who we are."""

from dataclasses import dataclass, field

import grpc


@dataclass(frozen=True)
class Endpoint:
    """A server and what is needed to speak with it."""

    address: str
    """host:port."""
    authority_pem: bytes = field(repr=False)
    """Certificates of the authorities that may vouch for the server, PEM."""
    certificate_pem: bytes | None = field(default=None, repr=False)
    """Our certificate, PEM; none on the enrolment listener."""
    key_pem: bytes | None = field(default=None, repr=False)
    """Its private key, PEM."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns gRPC's form of it."""
        return grpc.ssl_channel_credentials(
            root_certificates=self.authority_pem, private_key=self.key_pem, certificate_chain=self.certificate_pem
        )
