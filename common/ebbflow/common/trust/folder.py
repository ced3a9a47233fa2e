"""A ceremony's folder: what is published and what is staged, as files such as "2.root.json" and "3.root.json".

The folder is all that people carry from machine to machine. It holds no private key.
"""

import re
from pathlib import Path

from tuf.api.metadata import Metadata, Root, Targets

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic
from ebbflow.common.trust.ceremony import Draft, read

_NAME = re.compile(r"([1-9][0-9]{0,9})\.(root|targets)\.json")


def newest(folder: Path, role: str) -> Path | None:
    """The file with the highest version of a role; None if there is none."""
    found = {
        int(match[1]): path
        for path in folder.glob("*.json")
        if (match := _NAME.fullmatch(path.name)) and match[2] == role
    }
    return found[max(found)] if found else None


def load(path: Path) -> "Metadata[Root] | Metadata[Targets]":
    """Reads one file.

    Raises:
        EbbflowError: CONFIG_INVALID if it cannot be read, METADATA_REFUSED if it is neither root nor targets.
    """
    try:
        return read(path.read_bytes(), str(path))
    except OSError as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}", path=path) from error


def draft(path: Path) -> Draft:
    """Reads a staged file, and what is published from the files beside it.

    Raises:
        EbbflowError: CONFIG_INVALID if the file before it is not in its folder; METADATA_REFUSED.
    """
    proposed = load(path)
    version, folder = proposed.signed.version, path.absolute().parent
    if isinstance(proposed.signed, Root):
        return Draft(proposed, _root(folder / f"{version - 1}.root.json"))
    root_path = newest(folder, "root")
    if root_path is None:
        raise _lacks(folder / "N.root.json")
    before = load(_there(folder / f"{version - 1}.targets.json"))
    if not isinstance(before.signed, Targets):
        raise EbbflowError(Reason.METADATA_REFUSED, f"{version - 1}.targets.json holds no targets")
    return Draft(proposed, _root(root_path), before)


def save(folder: Path, role: str, data: bytes, *, replace: bool = True) -> Path:
    """Writes a version under its name.

    Raises:
        EbbflowError: ALREADY_EXISTS if it is there and may not be replaced; DISK_FULL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{read(data, role).signed.version}.{role}.json"
    if path.exists() and not replace:
        message = f"{path} is staged already, maybe with signatures; remove it to stage it anew"
        raise EbbflowError(Reason.ALREADY_EXISTS, message, path=path)
    write_atomic(path, data, 0o644)
    return path


def _root(path: Path) -> Metadata[Root]:
    found = load(_there(path))
    if not isinstance(found.signed, Root):
        raise EbbflowError(Reason.METADATA_REFUSED, f"{path} holds no root")
    return found


def _there(path: Path) -> Path:
    if not path.exists():
        raise _lacks(path)
    return path


def _lacks(path: Path) -> EbbflowError:
    message = f"{path} is not there: keep the files that `ebbflow trust stage` wrote together in one folder"
    return EbbflowError(Reason.CONFIG_INVALID, message, path=path)
