"""Files that the signed metadata lists, and holding what is on the disk against it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class SignedFile:
    """Length and hash of a file. Of a delta they are only the cloud's word: its result is checked instead."""

    sha256: str
    """Lower-case hexadecimal."""
    size_bytes: int


def verify(path: Path, file: SignedFile) -> bool:
    """Whether a file is there and is exactly the signed one. Reads it all, in bounded memory."""
    try:
        with path.open("rb") as opened:
            return path.stat().st_size == file.size_bytes and (
                hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
            )
    except OSError:
        return False
