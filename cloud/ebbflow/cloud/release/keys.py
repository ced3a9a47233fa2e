"""The signing keys of the cloud: made once, one file each, by the embedded default; opened wherever they are later."""

import shutil
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Signer

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import sync_folder, write_atomic
from ebbflow.common.trust.signers import open_signer

ROOTS: Final = ("root-1", "root-2", "root-3")
NAMES: Final = (*ROOTS, "targets", "online", "distiller", "gate", "feedback")
"""Every key, by the name of its file without ".pem"."""

ADVICE: Final = """\
Everything needed to try Ebbflow is in {folder}. Before production:
  root-1.pem root-2.pem root-3.pem  move offline, to three people; two of them together can replace every other key
  targets.pem                       move offline; needed only to change who may sign releases or plans, and once a year
  distiller.pem                     leave only where `ebbflow cloud work` runs
  gate.pem                          leave only where `ebbflow cloud gate` runs, never beside distiller.pem
  online.pem feedback.pem           leave only where `ebbflow cloud serve` runs
To put weights on a device a thief needs distiller.pem and gate.pem, or targets.pem, or two of the root keys, and in
each case online.pem or the machine that uses it. `ebbflow trust status` says when somebody must sign."""


def create(folder: Path) -> None:
    """Makes every key (ed25519, unencrypted PKCS #8 PEM, readable by the owner only): all of them, or none.

    Raises:
        EbbflowError: ALREADY_EXISTS if the folder is not empty; nothing is overwritten. DISK_FULL.
    """
    if folder.exists() and any(folder.iterdir()):
        raise EbbflowError(Reason.ALREADY_EXISTS, f"{folder} already holds files", folder=folder)
    unfinished = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True, mode=0o700)
    for name in NAMES:
        write_atomic(_path(unfinished, name), CryptoSigner.generate_ed25519().private_bytes)
    unfinished.replace(folder)
    sync_folder(folder.parent)


def load(folder: Path, name: str) -> CryptoSigner:
    """Returns the signer of one of `NAMES`.

    Raises:
        EbbflowError: NOT_INITIALISED if the file is not there, FILE_CORRUPT if it is no key.
    """
    path = _path(folder, name)
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
    except FileNotFoundError as error:
        raise EbbflowError(Reason.NOT_INITIALISED, f"the key {path} is not there", path=path) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EbbflowError(Reason.FILE_CORRUPT, f"{path} is not an unencrypted PEM key", path=path) from error


def open_key(uri: str, folder: Path, name: str, secret: str = "") -> Signer:
    """Returns the signer that a process uses: the one that a URI names, or else the file of that name.

    Args:
        uri: see `ebbflow.common.trust.signers`; empty means the file in `folder`.
        folder: of the embedded default's keys.
        name: one of `NAMES`.
        secret: passphrase of an encrypted file, or PIN of an HSM.

    Raises:
        EbbflowError: NOT_INITIALISED if the default's file is not there; KEY_UNUSABLE.
    """
    path = _path(folder, name)
    if not uri and not path.exists():
        message = f"the key {path} is not there, and no setting {name}_key names another"
        raise EbbflowError(Reason.NOT_INITIALISED, message, path=path)
    return open_signer(uri or f"file2:{path}", lambda _what: secret)


def advice(folder: Path) -> str:
    """Returns which keys to move where before production, for the terminal."""
    return ADVICE.format(folder=folder)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.pem"
