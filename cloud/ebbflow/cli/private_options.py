"""Options of `ebbflow distillation start` for private texts, and what is made of them."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbflow.cli.output import say
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from ebbflow.client.admin import AdminClient

_FAR_OFF = 2

Corpus = Annotated[
    Path | None,
    typer.Option(help='Lines of JSON with "topic" and "text" to train on last, privately.'),
]
Epsilon = Annotated[float, typer.Option(min=0, help="What the whole run may cost each text.")]
Delta = Annotated[float, typer.Option(min=0, help="0 means 1e-6.")]
Steps = Annotated[int, typer.Option(min=0, help="Steps on them.")]
BatchSize = Annotated[int, typer.Option(min=0, help="Texts expected in a step.")]
CorpusSize = Annotated[
    int,
    typer.Option(min=0, help="A round, public number: about how many texts there are."),
]
ClipNorm = Annotated[float, typer.Option(min=0, help="Largest norm of one text's gradient; 0 means 1.")]
LearningRate = Annotated[float, typer.Option(min=0, help="Of the steps on them.")]
SequenceLength = Annotated[int, typer.Option(min=0, help="Tokens of a text; 0 means --sequence-length.")]
Rank = Annotated[int, typer.Option(min=0, help="Rank of the change; 0 trains every weight.")]


@dataclass(frozen=True)
class PrivateOptions:
    """What was said of private texts."""

    corpus: Path | None
    epsilon: float
    delta: float
    steps: int
    batch_size: int
    corpus_size: int
    clip_norm: float
    learning_rate: float
    sequence_length: int
    rank: int

    @classmethod
    def of(cls, said: dict[str, Any]) -> "PrivateOptions":
        """Picks them out of all that was said on the command line."""
        return cls(**{field.name: said[f"private_{field.name}"] for field in fields(cls)})

    def add_to(self, distillation: Any, client: "AdminClient") -> None:
        """Uploads the texts and completes the order; does nothing without any.

        Raises:
            EbbflowError: INVALID_REQUEST if epsilon or the public size is missing, CONFIG_INVALID if the file cannot be
                read, and what uploading raises.
        """
        from ebbflow.api.v1.distillation_pb2 import PrivateTraining

        if self.corpus is None:
            return
        for option, value in (("epsilon", self.epsilon), ("corpus-size", self.corpus_size), ("steps", self.steps)):
            if not value:
                message = f"--private-corpus needs --private-{option}"
                raise EbbflowError(Reason.INVALID_REQUEST, message, field=f"private_training.{option}")
        _compare(self.corpus, self.corpus_size)
        distillation.private_corpus_sha256 = client.upload(self.corpus, private=True).sha256
        distillation.private_training.CopyFrom(
            PrivateTraining(
                epsilon=self.epsilon,
                delta=self.delta,
                steps=self.steps,
                batch_size=min(self.batch_size, self.corpus_size),
                corpus_size=self.corpus_size,
                clip_norm=self.clip_norm,
                learning_rate=self.learning_rate,
                sequence_length=self.sequence_length,
                rank=self.rank,
            )
        )

    @contextlib.contextmanager
    def kept(self, client: "AdminClient", distillation: Any) -> Iterator[None]:
        """Takes the texts out of the cloud again if the order in the block is refused, because none may ever come."""
        from ebbflow.api.v1.distillation_pb2 import DeletePrivateCorpusRequest

        try:
            yield
        except EbbflowError:
            if self.corpus is not None:
                with contextlib.suppress(EbbflowError):  # that another distillation needs them, or the same as before
                    client.distillations.DeletePrivateCorpus(
                        DeletePrivateCorpusRequest(private_corpus_sha256=distillation.private_corpus_sha256)
                    )
            raise


def sha256_of(path: Path) -> bytes:
    """Returns the name of a file in the blob store.

    Raises:
        EbbflowError: CONFIG_INVALID if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}", path=path) from error


def say_account(distillation: Any) -> None:
    """Tells whoever ordered a distillation if its private texts were trained on before, and what that adds up to."""
    account = distillation.private_account
    if len(account.distillations) > 1:
        others = ", ".join(name for name in account.distillations if name != distillation.name)
        say(
            f"note: with this one {len(account.distillations)} distillations learn from these texts ({others});"
            f" together they cost each text epsilon {account.epsilon:.3g} at delta {account.delta:.2g}"
        )


def _compare(path: Path, corpus_size: int) -> None:
    """Says here, to the owner of the texts alone, if the public number is far off."""
    try:
        with path.open("rb") as file:
            count = sum(1 for line in file if line.strip())
    except OSError as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}", path=path) from error
    if count * _FAR_OFF < corpus_size:
        say(f"note: {path} has {count} texts, far fewer than --private-corpus-size {corpus_size}: little is learnt")
    elif count > corpus_size * _FAR_OFF:
        say(
            f"note: {path} has {count} texts, far more than --private-corpus-size {corpus_size}: larger batches, slower"
        )
