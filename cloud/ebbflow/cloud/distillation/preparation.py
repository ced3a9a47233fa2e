"""Everything that a run needs before its first step: student, tokenizer, teacher and data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import sqlalchemy as sa
from google.protobuf import json_format
from sqlalchemy.orm import Session

from ebbflow.api.v1 import student_pb2
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation import corpus, private_texts
from ebbflow.cloud.distillation.corpus import Corpus, Text
from ebbflow.cloud.distillation.course import Course
from ebbflow.cloud.distillation.mixture import Documents, Sequences, encode_documents
from ebbflow.cloud.distillation.private_accounting import Account, calibrate
from ebbflow.cloud.distillation.private_recipe import PrivateRecipe
from ebbflow.cloud.distillation.recipe import Precision, Recipe
from ebbflow.cloud.distillation.trainer import Trainer
from ebbflow.cloud.feedback import adapters, population_texts, round_rows
from ebbflow.cloud.registry.tables import Distillation, Json, Release, Round, Student
from ebbflow.cloud.teacher.model import Teacher, load_tokenizer
from ebbflow.common import names
from ebbflow.common.codes.kept import choose_kept
from ebbflow.common.codes.twin import load_weights
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student import model
from ebbflow.common.student.checkpoint import load_checkpoint
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.tokens import Tokenizer

if TYPE_CHECKING:
    from ebbflow.cloud.distillation.private_training import PrivateTrainer

_PROBE_TEXTS = 8
_PROBE_TOKENS = 64
_COMPARED_TEXTS = 50


@dataclass(frozen=True)
class Order:
    """What the registry says of a job, read in one transaction."""

    job: Distillation
    student: Student
    base: Json | None
    """Column `targets` of the release to begin from."""
    sibling: Json | None
    """Column `targets` of the student's newest release, whose tokenizer goes on."""
    prompts: Sequence[Text] = ()
    """Of a population, each under a topic of its own."""
    prompt_weights: Mapping[str, float] = field(default_factory=dict)
    """Share of each among them, by that topic."""
    adapter_round: Round | None = None
    """Closed round whose average change is added to the base first."""

    @classmethod
    def read(cls, session: Session, job: Distillation) -> "Order":
        """Looks everything up.

        Raises:
            EbbflowError: STUDENT_NOT_FOUND, RELEASE_NOT_FOUND, ROUND_NOT_FOUND, POPULATION_NOT_FOUND or STATE_CONFLICT.
        """
        student = session.get(Student, job.student_id)
        if student is None:
            raise EbbflowError(Reason.STUDENT_NOT_FOUND, f"there is no {names.make('students', job.student_id)}")
        base = session.get(Release, (job.student_id, job.base_release)) if job.base_release else None
        if job.base_release and base is None:
            name = names.release(job.student_id, job.base_release)
            raise EbbflowError(Reason.RELEASE_NOT_FOUND, f"there is no {name} to begin from")
        newest = sa.select(Release).where(Release.student_id == job.student_id).order_by(Release.number.desc()).limit(1)
        sibling = session.scalars(newest).one_or_none()
        prompts: list[Text] = []
        weights: dict[str, float] = {}
        if job.population:
            prompts = population_texts.texts(session, student.id, job.population)
            weights = population_texts.weights(session, student.id, job.population)
        adapter_round = round_rows.find(session, job.adapter_round_id) if job.adapter_round_id else None
        targets = base.targets if base else None, sibling.targets if sibling else None
        return cls(job, student, *targets, prompts, weights, adapter_round)

    @property
    def architecture(self) -> student_pb2.Architecture:
        """Shape of the student."""
        message = student_pb2.Architecture()
        json_format.ParseDict(self.student.architecture, message, ignore_unknown_fields=True)
        return message

    def recipe(self, precision: Precision) -> Recipe:
        """How to train.

        Raises:
            EbbflowError: INVALID_REQUEST naming the field that cannot be.
        """
        changes_weights = self.job.adapter_round_id or self.job.private_corpus_sha256
        return Recipe.from_json(self.job.recipe, precision, least_steps=0 if changes_weights else 1)

    def private_recipe(self, recipe: Recipe) -> PrivateRecipe | None:
        """How to train on private texts; None without any.

        Raises:
            EbbflowError: INVALID_REQUEST naming the field that cannot be.
        """
        if not self.job.private_corpus_sha256:
            return None
        return PrivateRecipe.from_json(self.job.private_training, recipe.sequence_length)

    def fingerprint(self, recipe: Recipe) -> str:
        """Names everything that decides the run's weights, so that a checkpoint of another run is not taken for its."""
        parts = [
            self.job.id,
            vars(recipe),
            self.job.mixture,
            self.base,
            self.student.corpus_sha256,
            self.student.teacher,
            self.student.architecture,
            [(text.topic, text.text) for text in self.prompts],
            dict(self.prompt_weights),
            self.job.population_share,
            self.job.adapter_round_id,
            self.job.private_corpus_sha256,
            self.private_recipe(recipe),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=vars).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """A run that can begin."""

    trainer: Trainer | Course
    tokenizer: Tokenizer
    probe_token_ids: Sequence[Sequence[int]]
    fingerprint: str
    kept_bf16: tuple[str, ...] = ()
    """Matrices that every precision of the release keeps in bf16."""
    account: Account | None = None
    """What private training costs each text; None without it."""


def prepare(order: Order, blobs: BlobStore, scratch: Path, precision: Precision) -> Run:
    """Loads and builds what the run needs.

    Raises:
        EbbflowError: INVALID_REQUEST, CORPUS_INVALID, BLOB_NOT_FOUND, CHECKPOINT_UNREADABLE, TEACHER_MISMATCH or
            FILE_CORRUPT, whichever keeps it from beginning.
    """
    recipe = order.recipe(precision)
    private = order.private_recipe(recipe)
    account = calibrate(private) if private is not None else None
    texts = corpus.load(blobs, order.student.corpus_sha256)
    teacher = Teacher.load(order.student.teacher) if recipe.kl_weight > 0 and recipe.steps else None
    tokenizer = _tokenizer(order, teacher, texts, blobs)
    if teacher is not None:
        _check_same_tokens(teacher, tokenizer, texts)
    student = _student(order, tokenizer, recipe.seed, blobs, scratch)
    kept_bf16 = choose_kept(student.config, recipe.keep_bf16)
    documents = Documents.encode([*texts.split("train"), *order.prompts], tokenizer)
    _check_fits(recipe, student.config, teacher, documents)
    public = Trainer(student, _sequences(order, recipe, documents), recipe, teacher)
    trainer: Trainer | Course = public
    if private is not None and account is not None:
        trainer = _course(
            public, recipe, private, account, _private_documents(order, private, tokenizer, student.config, blobs)
        )
    probe = _probe(texts, tokenizer, student.config)
    return Run(trainer, tokenizer, probe, order.fingerprint(recipe), kept_bf16, account)


def _private_documents(
    order: Order, private: PrivateRecipe, tokenizer: Tokenizer, config: StudentConfig, blobs: BlobStore
) -> list[list[int]]:
    """Tokens of all private texts, whatever their split: to set some aside would hang on how many there are."""
    if private.sequence_length > config.max_position_embeddings:
        message = f"private_training.sequence_length is more than the {config.max_position_embeddings} of the context"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="private_training.sequence_length")
    if tokenizer.size > config.vocab_size:  # of the tokenizer and not of the texts, which an answer must not describe
        raise EbbflowError(Reason.TEACHER_MISMATCH, "the tokenizer has more tokens than the student")
    texts = [text.text for text in private_texts.stream(blobs, order.job.private_corpus_sha256)]
    return encode_documents(tokenizer, texts)


def _course(
    trainer: Trainer, recipe: Recipe, private: PrivateRecipe, account: Account, documents: list[list[int]]
) -> Course:
    def begin(student: model.Student) -> "PrivateTrainer":
        from ebbflow.cloud.distillation.private_training import PrivateTrainer

        return PrivateTrainer(student, documents, private, account.noise_multiplier, recipe.seed)

    return Course(trainer, begin, recipe.steps, private.steps)


def _sequences(order: Order, recipe: Recipe, documents: Documents) -> Sequences:
    mixture = order.job.mixture
    if order.prompts:
        share = order.job.population_share or population_texts.DEFAULT_SHARE
        mixture = population_texts.join(documents, mixture, order.prompt_weights, share)
    return Sequences(documents, mixture, length=recipe.sequence_length, count=recipe.sequences, seed=recipe.seed)


def _tokenizer(order: Order, teacher: Teacher | None, texts: Corpus, blobs: BlobStore) -> Tokenizer:
    """The student's tokenizer: that of its releases, else the teacher's, else a new one of its own."""
    targets = order.base or order.sibling
    if targets is not None:
        return Tokenizer.from_bytes(blobs.read(_sha256(targets, "tokenizer")))
    size = order.architecture.vocabulary_size
    if size and not order.architecture.initial_checkpoint:
        return Tokenizer.train((text.text for text in texts.split("train")), size)
    return teacher.tokenizer if teacher is not None else load_tokenizer(order.student.teacher)


def _student(order: Order, tokenizer: Tokenizer, seed: int, blobs: BlobStore, scratch: Path) -> model.Student:
    shape = order.architecture
    if order.base is not None:
        scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=scratch) as folder:
            path = Path(folder) / "base.safetensors"
            blobs.fetch(_sha256(order.base, "bf16"), path)
            student = load_weights(path)
        if order.adapter_round is not None:
            average = round_rows.aggregate_of(order.adapter_round).adapter.blob_sha256.hex()
            adapters.apply(student, blobs.read(average), round_rows.plan_of(order.adapter_round).adapter)
        return student.requires_grad_(True).train()
    if shape.initial_checkpoint:
        return load_checkpoint(Path(shape.initial_checkpoint)).train()
    config = StudentConfig(
        vocab_size=tokenizer.size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rope_theta=shape.rope_theta,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    return model.Student.random(config, seed)


def _check_same_tokens(teacher: Teacher, tokenizer: Tokenizer, texts: Corpus) -> None:
    """A divergence between distributions over different tokens would mean nothing."""
    theirs, sample = teacher.tokenizer, [text.text for text in texts.texts[:_COMPARED_TEXTS]]
    same = (theirs.size, theirs.eos_id, theirs.bos_id) == (tokenizer.size, tokenizer.eos_id, tokenizer.bos_id)
    if not same or encode_documents(theirs, sample) != encode_documents(tokenizer, sample):
        message = "teacher and student cut text into different tokens; set vocabulary_size to 0, or kl_weight to 0"
        raise EbbflowError(Reason.TEACHER_MISMATCH, message)


def _check_fits(recipe: Recipe, config: StudentConfig, teacher: Teacher | None, documents: Documents) -> None:
    most = min(config.max_position_embeddings, teacher.context_tokens if teacher else config.max_position_embeddings)
    if recipe.sequence_length > most:
        message = f"recipe.sequence_length is more than the {most} tokens of the context"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="recipe.sequence_length")
    widest = min(config.vocab_size, teacher.vocabulary_size if teacher else config.vocab_size)
    if int(documents.tokens.max()) >= widest:
        message = f"the tokenizer has tokens above {widest}, which the student or its teacher lacks"
        raise EbbflowError(Reason.TEACHER_MISMATCH, message)
    if config.eos_token_id != documents.tokens[-1]:
        raise EbbflowError(
            Reason.TEACHER_MISMATCH, "the checkpoint to begin from has another tokenizer than the teacher"
        )
    if teacher is not None and teacher.vocabulary_size < config.vocab_size:
        raise EbbflowError(Reason.TEACHER_MISMATCH, "the student has more tokens than its teacher")


def _probe(texts: Corpus, tokenizer: Tokenizer, config: StudentConfig) -> list[list[int]]:
    """The beginnings of the first gate text of each topic, eight at most."""
    first = {text.topic: text.text for text in reversed(texts.split("gate") or texts.split("train"))}
    chosen = [first[topic] for topic in texts.topics if topic in first][:_PROBE_TEXTS]
    most = min(_PROBE_TOKENS, config.max_position_embeddings)
    return [ids[:most] for ids in encode_documents(tokenizer, chosen)]


def _sha256(targets: Json, kind: str) -> str:
    for file in targets.values():
        if file["kind"] == kind:
            return str(file["sha256"])
    raise EbbflowError(Reason.RELEASE_NOT_FOUND, f"the release to begin from has no {kind}")
