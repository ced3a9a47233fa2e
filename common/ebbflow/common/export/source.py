"""What every export begins from, and how it comes to its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from ebbflow.common.codes import quantise
from ebbflow.common.codes.artefact import Variant, read_variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.tokens import Tokenizer


@dataclass(frozen=True)
class Source:
    """One release in one precision.

    Attributes:
        variant: its weights.
        tokenizer_json: content of its tokenizer.json.
        name: what it is called in the files, such as "faq/3".
    """

    variant: Variant
    tokenizer_json: bytes
    name: str

    @classmethod
    def read(cls, weights: Path, tokenizer: Path, name: str) -> "Source":
        """Reads the files of a release.

        Raises:
            EbbflowError: FILE_CORRUPT if the weights are not whole; CHECKPOINT_UNREADABLE if the tokenizer cannot be
                read.
        """
        try:
            tokenizer_json = tokenizer.read_bytes()
        except OSError as error:
            message = f"{tokenizer} cannot be read: {error.strerror}"
            raise EbbflowError(Reason.CHECKPOINT_UNREADABLE, message, path=tokenizer) from error
        return cls(read_variant(weights), tokenizer_json, name)

    @property
    def config(self) -> StudentConfig:
        """Shape of the student."""
        return self.variant.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer as agents use it.

        Raises:
            EbbflowError: CHECKPOINT_UNREADABLE if it cannot be read, or has more tokens than the student.
        """
        found = Tokenizer.from_bytes(self.tokenizer_json)
        if found.size > self.config.vocab_size:
            message = f"the tokenizer has {found.size} tokens and the student only {self.config.vocab_size}"
            raise EbbflowError(Reason.CHECKPOINT_UNREADABLE, message, field="vocab_size")
        return found


def bf16_bits(variant: Variant, name: str) -> quantise.UInt16:
    """Returns the bits of a tensor that is kept as bfloat16, by its Hugging Face name.

    Raises:
        EbbflowError: FILE_CORRUPT if a number is not finite.
    """
    bits = cast("quantise.UInt16", variant.tensors[name])
    if not quantise.are_finite_bf16(bits):
        raise EbbflowError(Reason.FILE_CORRUPT, f"{name} holds numbers that are not finite", tensor=name)
    return bits


def check_free(out: Path) -> Path:
    """Returns the folder that something new can be put into as `out`, made if it is not there.

    Raises:
        EbbflowError: ALREADY_EXISTS if something is at `out`; CONFIG_INVALID if the folder cannot be.
    """
    if out.exists():
        raise EbbflowError(Reason.ALREADY_EXISTS, f"{out} exists already", path=out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    return out.parent


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields a path beside `out` to write a file or folder at; it becomes `out` when the block ends without an error.

    Raises:
        EbbflowError: ALREADY_EXISTS if something is at `out`; DISK_FULL; CONFIG_INVALID if it cannot be written there.
    """
    try:
        with full_disk_named(out), TemporaryDirectory(dir=check_free(out), prefix=f".{out.name}.") as folder:
            path = Path(folder) / out.name
            yield path
            path.rename(out)
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> EbbflowError:
    return EbbflowError(Reason.CONFIG_INVALID, f"{out} cannot be written: {error.strerror}", path=out)
