"""Users as the device knows them: a keyed hash, by a key that never leaves it."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import sync_folder, write_atomic

_KEY_BYTES = 32


class UserHasher:
    """Turns the application's user keys into hashes that nobody can turn back without the device's key."""

    def __init__(self, key: bytes) -> None:
        """Takes the device's key, 32 bytes."""
        self._key = key

    @classmethod
    def load(cls, path: Path) -> "UserHasher":
        """Reads the device's key, or makes one (mode 0600) where there is none.

        Raises:
            EbbflowError: FILE_CORRUPT if the file does not hold 32 bytes.
        """
        if not path.exists():
            _make_key(path)
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise EbbflowError(Reason.FILE_CORRUPT, f"{path} does not hold a key of {_KEY_BYTES} bytes", path=path)
        return cls(key)

    def hash(self, user_key: str | None) -> bytes:
        """Returns 32 bytes. Requests without a user key, or with an empty one, share one user."""
        message = b"user:" + user_key.encode("utf-8", "surrogatepass") if user_key else b"nobody"
        return hmac.digest(self._key, message, hashlib.sha256)

    @property
    def fingerprint(self) -> bytes:
        """Tells this key from another one, and nothing else; 32 bytes."""
        return hmac.digest(self._key, b"fingerprint", hashlib.sha256)


def _make_key(path: Path) -> None:
    """Writes a fresh key; when two processes race, the first one's stays."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    write_atomic(fresh, secrets.token_bytes(_KEY_BYTES))
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
        sync_folder(path.parent)
