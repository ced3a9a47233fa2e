"""Opens private keys wherever they are: in files, in a cloud's key service, in a hardware security module.

A key is named by a URI of securesystemslib, such as "file2:/keys/gate.pem", "awskms:alias/gate",
"gcpkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1",
"azurekms://vault.vault.azure.net/keys/gate" or "hsm:2?label=gate". Anything without a scheme is the path of a file.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlparse

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    AWSSigner,
    AzureSigner,
    CryptoSigner,
    GCPSigner,
    HSMSigner,
    Key,
    Signature,
    Signer,
)

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic

Secret = Callable[[str], str]
"""Returns a secret by what it is: "passphrase" of a key file, "pin" of an HSM. Empty if there is none."""

EXTRAS: Final = {"awskms": "awskms", "gcpkms": "gcpkms", "azurekms": "azurekms", "hsm": "hsm"}
"""The extra that each scheme needs."""
SCHEMES: Final = ("file2", *EXTRAS)

_SCHEME = re.compile(r"([a-z][a-z0-9]+):")
_ENCRYPTED = b"ENCRYPTED PRIVATE KEY"


class _NamedSigner(Signer):
    """A signer whose failures have a name."""

    def __init__(self, uri: str, signer: Signer) -> None:
        self._uri, self._signer = uri, signer

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Secret | None = None) -> Signer:
        """Opens a key whose public part is known."""
        return cls(priv_key_uri, Signer.from_priv_key_uri(priv_key_uri, public_key, secrets_handler))

    @property
    def public_key(self) -> Key:
        return self._signer.public_key

    def sign(self, payload: bytes) -> Signature:
        """Signs.

        Raises:
            EbbflowError: KEY_UNUSABLE.
        """
        try:
            return self._signer.sign(payload)
        except Exception as error:
            raise _unusable(self._uri, error) from error


def open_signer(uri: str, secret: Secret = lambda _what: "") -> Signer:
    """Opens a key; one in a service or an HSM is asked for its public part.

    Args:
        uri: where the key is; see above.
        secret: asked for the passphrase or PIN when one is needed.

    Raises:
        EbbflowError: KEY_UNUSABLE, with what to do about it.
    """
    scheme, rest = _split(uri)
    if scheme == "file2":
        return _of_file(Path(rest), secret)
    if scheme not in EXTRAS:
        message = f"keys of the kind {scheme!r} are not supported; supported are {', '.join(SCHEMES)}"
        raise EbbflowError(Reason.KEY_UNUSABLE, message, key=uri)
    try:
        found, public = _IMPORTS[scheme](uri, secret)
        return _NamedSigner(uri, SIGNER_FOR_URI_SCHEME[scheme].from_priv_key_uri(found, public, secret))  # type: ignore[attr-defined]
    except Exception as error:
        raise _unusable(uri, error) from error


def create_file(path: Path, passphrase: str = "") -> CryptoSigner:
    """Makes an ed25519 key in a PEM file that only its owner can read, encrypted if there is a passphrase.

    Raises:
        EbbflowError: ALREADY_EXISTS, DISK_FULL; CONFIG_INVALID if the folder is not there.
    """
    if path.exists():
        raise EbbflowError(Reason.ALREADY_EXISTS, f"{path} exists already; keys are never overwritten", path=path)
    if not path.parent.is_dir():
        raise EbbflowError(Reason.CONFIG_INVALID, f"the folder {path.parent} is not there", path=path)
    signer = CryptoSigner.generate_ed25519()
    data = signer.private_bytes
    if passphrase:
        key = load_pem_private_key(data, None)
        data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase.encode()))
    write_atomic(path, data)
    return signer


def public_text(key: Key) -> str:
    """The public part as JSON: {"keyid": ..., "keytype": ..., "scheme": ..., "keyval": ...}."""
    return json.dumps({"keyid": key.keyid, **key.to_dict()}, indent=1, sort_keys=True) + "\n"


def read_public(path: Path) -> Key | None:
    """Reads what `public_text` wrote; None if the file holds something else, such as a private key.

    Raises:
        EbbflowError: CONFIG_INVALID if the file cannot be read.
    """
    try:
        fields: Any = json.loads(path.read_bytes())
        return Key.from_dict(fields.pop("keyid"), fields)
    except OSError as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}", path=path) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def public_key(text: str, secret: Secret = lambda _what: "") -> Key:
    """Returns the public part of a key that is named by a file with the public part, a private file, or a URI.

    Raises:
        EbbflowError: KEY_UNUSABLE, CONFIG_INVALID.
    """
    scheme, rest = _split(text)
    found = read_public(Path(rest)) if scheme == "file2" else None
    return found or open_signer(text, secret).public_key


def _split(uri: str) -> tuple[str, str]:
    match = _SCHEME.match(uri)
    if match is None:
        return "file2", uri
    return match[1], uri[match.end() :]


def _of_file(path: Path, secret: Secret) -> Signer:
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"the key {path} cannot be read: {error.strerror}"
        raise EbbflowError(Reason.KEY_UNUSABLE, message, key=path) from error
    passphrase = secret("passphrase") if _ENCRYPTED in data else ""
    if _ENCRYPTED in data and not passphrase:
        message = f"the key {path} is encrypted and there is no passphrase: set EBBFLOW_KEY_SECRET"
        raise EbbflowError(Reason.KEY_UNUSABLE, message, key=path)
    try:
        return CryptoSigner(load_pem_private_key(data, passphrase.encode() or None))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = "the passphrase is wrong, or the file is damaged" if passphrase else "it is not a private key in PEM"
        raise EbbflowError(Reason.KEY_UNUSABLE, f"the key {path} cannot be used: {why}", key=path) from error


def _of_hsm(uri: str, secret: Secret) -> tuple[str, Key]:
    parts = urlparse(uri)
    label = dict(parse_qsl(parts.query)).get("label")
    _, key = HSMSigner.import_(int(parts.path) if parts.path else None, label, secret)
    return uri, key  # what `import_` says of the token repeats what we have


def _of_azure(uri: str, _secret: Secret) -> tuple[str, Key]:
    parts = urlparse(uri)
    words = parts.path.strip("/").split("/")
    if words[0] != "keys" or len(words) not in {2, 3}:
        raise ValueError("it must be azurekms://VAULT.vault.azure.net/keys/NAME/VERSION")
    found, key = AzureSigner.import_(parts.netloc.partition(".")[0], words[1])
    if len(words) == 3 and found.rpartition("/")[2] != words[2]:  # noqa: PLR2004
        raise ValueError("its version is not the newest one of that key")
    return found, key


def _of_aws(uri: str, _secret: Secret) -> tuple[str, Key]:
    return AWSSigner.import_(unquote(_split(uri)[1]))


def _of_gcp(uri: str, _secret: Secret) -> tuple[str, Key]:
    return GCPSigner.import_(_split(uri)[1])


_IMPORTS: Final[dict[str, Callable[[str, Secret], tuple[str, Key]]]] = {
    "awskms": _of_aws,
    "gcpkms": _of_gcp,
    "azurekms": _of_azure,
    "hsm": _of_hsm,
}


def _unusable(uri: str, error: Exception) -> EbbflowError:
    """Says what is wrong; texts of other libraries' errors stay in the chain, for they may hold secrets."""
    if isinstance(error, EbbflowError):
        return error
    scheme = _split(uri)[0]
    if isinstance(error, (UnsupportedLibraryError, NameError, ImportError)):
        extra = EXTRAS.get(scheme, "trust")
        message = f"the key {uri} needs the extra `{extra}`: pip install 'ebbflow[{extra}]'"
        return EbbflowError(Reason.KEY_UNUSABLE, message, key=uri, extra=extra)
    why = f": {error}" if isinstance(error, ValueError) else f" ({type(error).__name__})"
    return EbbflowError(Reason.KEY_UNUSABLE, f"the key {uri} cannot be used{why}", key=uri)
