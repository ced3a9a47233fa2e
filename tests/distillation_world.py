"""A student, its queue and a worker on real parts, for tests that distil."""

from pathlib import Path
from typing import Any

import tiny_models
from google.protobuf import json_format

from ebbflow.api.v1 import distillation_pb2, student_pb2
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.distillation.worker import Worker
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Distillation, DistillationState, Release, Student


def worker_of(registry: Registry, blobs: LocalBlobStore, folder: Path, **options: Any) -> Worker:
    """A worker that checkpoints only when it stops."""
    settings: dict[str, Any] = {"lease_s": 30.0, "checkpoint_interval_s": 1000.0, "name": "w", "precision": "float32"}
    return Worker(registry=registry, blobs=blobs, folder=folder / "work", **{**settings, **options})


def add_student(registry: Registry, blobs: LocalBlobStore, teacher: str, **shape: Any) -> str:
    """Adds the student faq, whose corpus is tiny."""
    architecture: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 500_000.0,
    }
    student = Student(
        id="faq",
        teacher=teacher,
        architecture=json_format.MessageToDict(student_pb2.Architecture(**{**architecture, **shape})),
        corpus_sha256=blobs.put(tiny_models.corpus_lines()).sha256,
        topics=list(tiny_models.TOPICS),
        privacy_policy={},
        selector="",
        create_time=clock.now(),
    )
    with registry.transaction() as session:
        session.add(student)
    return student.id


def queue(registry: Registry, job_id: str = "one", **fields: Any) -> str:
    """Queues a short distillation of it."""
    recipe = {
        "steps": 6,
        "batch_size": 4,
        "sequence_length": 24,
        "learning_rate": 3e-3,
        "kl_weight": 0.7,
        **fields.pop("recipe", {}),
    }
    values: dict[str, Any] = {"mixture": {}, "base_release": None, "round_id": None, **fields}
    job = Distillation(
        id=job_id,
        student_id="faq",
        state=DistillationState.QUEUED,
        recipe=json_format.MessageToDict(distillation_pb2.Recipe(**recipe)),
        create_time=clock.now(),
        update_time=clock.now(),
        **values,
    )
    with registry.transaction() as session:
        session.add(job)
    return job_id


def job_of(registry: Registry, job_id: str = "one") -> Distillation:
    """The job as it stands."""
    with registry.reading() as session:
        return session.get_one(Distillation, job_id)


def release_of(registry: Registry, number: int = 1) -> Release:
    """One of its releases."""
    with registry.reading() as session:
        return session.get_one(Release, ("faq", number))


def sha256_of(release: Release, kind: str) -> str:
    """Hash of a release's file."""
    return str(next(file["sha256"] for file in release.targets.values() if file["kind"] == kind))
