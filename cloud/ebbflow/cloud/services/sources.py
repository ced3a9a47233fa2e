"""What a distillation learns from beside the corpus: a round, a population, adapter updates, private texts, a base.

All of it is looked up and checked when the distillation is queued, together with what it cost the users.
"""

import math
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import distillation_pb2 as pb
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation import private_texts
from ebbflow.cloud.distillation.private_recipe import PrivateRecipe
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.cloud.feedback import adapters, population, round_rows
from ebbflow.cloud.registry.tables import Distillation, Json, Release, Round, Student
from ebbflow.cloud.services import mixture
from ebbflow.cloud.services.convert.common import to_json
from ebbflow.cloud.services.release import find as find_release
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

_SHA256_BYTES = 32


@dataclass(frozen=True)
class Private:
    """Private texts and how to train on them."""

    corpus_sha256: str = ""
    """Empty for none."""
    training: Json = field(default_factory=dict)
    """PrivateTraining, without its output-only fields."""


@dataclass(frozen=True)
class Sources:
    """What a queued distillation begins from and is fed with."""

    mixture: dict[str, float]
    base_release: int | None
    population: int
    population_share: float
    round_id: str | None
    adapter_round_id: str | None
    feedback_epsilon: float
    """Largest epsilon, per user and window, of the policies behind any of it, the base release's own included."""


def private(wanted: pb.Distillation, blobs: BlobStore) -> Private:
    """Checks recipe and private part of an order, and the format of every private text. Their number is told nobody.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field; BLOB_NOT_FOUND; CORPUS_INVALID with the line that is wrong.
    """
    named = wanted.private_corpus_sha256
    changes_weights = bool(named or wanted.adapter_round)
    recipe = Recipe.from_json(to_json(wanted.recipe), least_steps=0 if changes_weights else 1)
    if not recipe.steps and not (wanted.base_release or wanted.adapter_round):
        raise _wrong("recipe.steps may be 0 only with a base_release to change", "recipe.steps")
    if not named:
        if wanted.HasField("private_training"):
            raise _wrong("private_training needs private_corpus_sha256", "distillation.private_corpus_sha256")
        return Private()
    sha256 = private_sha256(named, "distillation.private_corpus_sha256")
    training = pb.PrivateTraining()
    training.CopyFrom(wanted.private_training)
    for output in ("noise_multiplier", "pld_epsilon", "prv_epsilon"):
        training.ClearField(output)
    PrivateRecipe.from_json(to_json(training), recipe.sequence_length)
    for _ in private_texts.stream(blobs, sha256):
        pass
    return Private(sha256, to_json(training))


def private_sha256(said: bytes, field_name: str) -> str:
    """Returns the hash of private texts as the registry writes it.

    Raises:
        EbbflowError: INVALID_REQUEST if it has another length.
    """
    if len(said) != _SHA256_BYTES:
        raise _wrong(f"private_corpus_sha256 must be {_SHA256_BYTES} bytes", field_name)
    return said.hex()


def resolve(session: Session, wanted: pb.Distillation, student: Student) -> Sources:
    """Looks up what an order names.

    Raises:
        EbbflowError: ROUND_NOT_FOUND, RELEASE_NOT_FOUND, POPULATION_NOT_FOUND; STATE_CONFLICT if something is not
            ready; SIGNAL_TOO_WEAK; INVALID_REQUEST if something is another student's or does not fit together.
    """
    mixed = _mixture(session, wanted, student)
    base = _base(session, wanted, student) if wanted.base_release else None
    epsilons = [mixed.feedback_epsilon]
    if wanted.population:
        population.find_ready(session, student.id, wanted.population)
        epsilons.append(population.epsilon(session, student.id, wanted.population))
    if wanted.adapter_round:
        round_ = _adapter_round(session, wanted, student)
        changed = round_rows.aggregate_of(round_).adapter.release
        if base not in {None, changed}:
            message = f"{wanted.adapter_round} changes {names.release(student.id, changed)} and no other release"
            raise _wrong(message, "distillation.base_release")
        base = changed
        epsilons.append(round_rows.plan_of(round_).policy.epsilon)
    return Sources(
        mixture=mixed.mixture,
        base_release=base,
        population=wanted.population,
        population_share=_share(wanted),
        round_id=names.parse(wanted.round, "rounds") if wanted.round else None,
        adapter_round_id=names.parse(wanted.adapter_round, "rounds") if wanted.adapter_round else None,
        feedback_epsilon=max(*epsilons, _epsilon_of_base(session, student.id, base)),
    )


def _mixture(session: Session, wanted: pb.Distillation, student: Student) -> mixture.Resolved:
    if wanted.mixture:
        return mixture.explicit(dict(wanted.mixture), student.topics)
    if wanted.round_alone and not wanted.round:
        raise _wrong("round_alone needs a round", "distillation.round")
    if wanted.round:
        round_ = round_rows.find(session, names.parse(wanted.round, "rounds"))
        return mixture.of_round(session, round_, student.id, alone=wanted.round_alone)
    return mixture.Resolved()


def _base(session: Session, wanted: pb.Distillation, student: Student) -> int:
    student_id, number = names.parse_release(wanted.base_release)
    if student_id != student.id:
        raise _wrong(f"{wanted.base_release} is no release of {wanted.student}", "distillation.base_release")
    return find_release(session, student_id, number).number


def _adapter_round(session: Session, wanted: pb.Distillation, student: Student) -> Round:
    row = round_rows.find(session, names.parse(wanted.adapter_round, "rounds"))
    round_rows.check_closed(row, student.id, "distillation.adapter_round")
    adapters.check_usable(round_rows.aggregate_of(row))
    return row


def _share(wanted: pb.Distillation) -> float:
    share = wanted.population_share
    if not (math.isfinite(share) and 0 <= share <= 1):
        raise _wrong("population_share must be 0 to 1", "distillation.population_share")
    if share and not wanted.population:
        raise _wrong("population_share needs a population", "distillation.population")
    return share


def _epsilon_of_base(session: Session, student_id: str, base: int | None) -> float:
    """What shaped the base release shapes this one too."""
    query = (
        sa.select(Distillation.feedback_epsilon)
        .join(Release, Release.distillation_id == Distillation.id)
        .where(Release.student_id == student_id, Release.number == base)
    )
    return (session.scalar(query) or 0.0) if base is not None else 0.0


def _wrong(message: str, field_name: str) -> EbbflowError:
    return EbbflowError(Reason.INVALID_REQUEST, message, field=field_name)
