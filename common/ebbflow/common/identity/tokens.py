"""The text of an enrolment token: "ebb1.ID.SECRET.PIN".

The pin is the SHA-256 of the cloud's certificate authority, so that a device that knows nothing yet can tell the real
cloud from somebody in between.
"""

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass

from ebbflow.common.errors import EbbflowError, Reason

_FORM = re.compile(r"ebb1\.([a-z0-9-]{1,63})\.([A-Za-z0-9_-]{43})\.([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, repr=False)
class EnrolmentSecret:
    """What a device is handed to enrol with."""

    token_id: str
    """Last part of the token's resource name."""
    secret: str
    """256 random bits as 43 URL-safe characters. Never logged, never stored by the cloud."""
    authority_sha256: str
    """Hexadecimal SHA-256 of the authority's certificate in DER."""

    @classmethod
    def generate(cls, token_id: str, authority_sha256: str) -> "EnrolmentSecret":
        """Makes a fresh one."""
        return cls(token_id, secrets.token_urlsafe(32), authority_sha256)

    @property
    def secret_sha256(self) -> str:
        """What the cloud keeps instead of the secret; a slow hash adds nothing to 256 random bits."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def encode(self) -> str:
        """Returns the text."""
        pin = base64.urlsafe_b64encode(bytes.fromhex(self.authority_sha256)).decode().rstrip("=")
        return f"ebb1.{self.token_id}.{self.secret}.{pin}"

    @classmethod
    def decode(cls, text: str) -> "EnrolmentSecret":
        """Reads the text back, ignoring white space around it.

        Raises:
            EbbflowError: TOKEN_INVALID if it is not a token as printed, for example because its end is missing.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise EbbflowError(Reason.TOKEN_INVALID, "this is not an enrolment token as it was printed")
        return cls(match[1], match[2], base64.urlsafe_b64decode(match[3] + "=").hex())

    def __repr__(self) -> str:
        return f"EnrolmentSecret({self.token_id!r})"
