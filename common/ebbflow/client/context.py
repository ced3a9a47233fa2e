"""The admin's context: a small TOML file that says which cloud to speak with and with which certificate."""

import datetime as dt
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ebbflow.client.endpoint import Endpoint
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic
from ebbflow.common.identity.peers import Peer

FILE_NAME = "context.toml"
VARIABLE = "EBBFLOW_CONTEXT"

_FIELDS = ("address", "authority", "certificate", "key")


@dataclass(frozen=True)
class AdminContext:
    """Which cloud, and as whom."""

    address: str
    """host:port of the mutually authenticated listener."""
    authority: Path
    """Certificates of the authorities that sign the cloud's listeners, PEM."""
    certificate: Path
    """The admin's certificate, PEM."""
    key: Path
    """Its private key, PEM."""

    @classmethod
    def load(cls, path: Path) -> "AdminContext":
        """Reads a context file; paths in it are relative to its folder.

        Raises:
            EbbflowError: NOT_INITIALISED if there is no such file, CONFIG_INVALID if it is wrong.
        """
        try:
            fields = tomllib.loads(path.read_text())
        except FileNotFoundError as error:
            message = f"there is no admin context at {path}; name one with --context or {VARIABLE}"
            raise EbbflowError(Reason.NOT_INITIALISED, message, path=path) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise EbbflowError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error}", path=path) from error
        if missing := [name for name in _FIELDS if not isinstance(fields.get(name), str)]:
            raise EbbflowError(Reason.CONFIG_INVALID, f"{path} lacks {', '.join(missing)}", path=path)
        address, *files = (fields[name] for name in _FIELDS)
        return cls(address, *(path.parent / Path(file).expanduser() for file in files))

    def endpoint(self) -> Endpoint:
        """Reads the files that the context names.

        Raises:
            EbbflowError: CONFIG_INVALID if one cannot be read, CERTIFICATE_EXPIRED if the certificate's time is over.
        """
        try:
            authority, certificate, key = (path.read_bytes() for path in (self.authority, self.certificate, self.key))
        except OSError as error:
            message = f"{error.filename} cannot be read: {error.strerror}"
            raise EbbflowError(Reason.CONFIG_INVALID, message, path=error.filename) from error
        peer = Peer.from_certificate(certificate)
        if peer.expire_time <= dt.datetime.now(dt.UTC):
            message = f"the certificate of {peer.identity.name} expired at {peer.expire_time:%Y-%m-%d %H:%M} UTC"
            raise EbbflowError(Reason.CERTIFICATE_EXPIRED, message)
        return Endpoint(self.address, authority, certificate, key)


def find_context(explicit: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the file to read: the explicit one, else the environment's, else the one in the user's configuration."""
    if explicit is not None:
        return explicit
    if path := environment.get(VARIABLE):
        return Path(path)
    folder = environment.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    return Path(folder) / "ebbflow" / FILE_NAME


def write_context(folder: Path, address: str, authority_pem: bytes, certificate_pem: bytes, key_pem: bytes) -> Path:
    """Writes a context with its files into a folder, private to the user; returns the context file's path.

    Raises:
        EbbflowError: DISK_FULL.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(folder / "authority.pem", authority_pem, 0o644)
    write_atomic(folder / "admin.key.pem", key_pem)
    write_atomic(folder / "admin.pem", certificate_pem, 0o644)
    lines = [f'address = "{address}"', 'authority = "authority.pem"', 'certificate = "admin.pem"']
    text = "\n".join([*lines, 'key = "admin.key.pem"', ""])
    write_atomic(folder / FILE_NAME, text.encode())
    return folder / FILE_NAME
