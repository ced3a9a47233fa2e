"""Neighbouring releases of a student of a few megabytes, and what they answer."""

import datetime as dt
import hashlib
import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_students

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Distillation, DistillationState, Release, ReleaseState
from ebbflow.common.codes.artefact import write_variant
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import path_of, variant_path
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.engine.loss import sequence_loss

PROMPTS = ("How do I read", "with block", "open() in a")
# Long enough that activations which engines round differently leave its mean alone.
PROBE = Probe(((1, *range(70, 130)), (1, *range(75, 135))), 0.05)
_STEP = 0.02
"""How far a release is from the one that all of them are neighbours of, as a share of the weights' deviation."""

Answers = tuple[str, ...]


@dataclass(frozen=True)
class Files:
    """One release: its blobs by kind, as in column `targets`."""

    targets: dict[str, Any]

    @property
    def sha256s(self) -> dict[str, str]:
        """Hashes by kind."""
        return {file["kind"]: file["sha256"] for file in self.targets.values()}


class Maker:
    """Makes releases without training."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder = folder
        self.tokenizer: Tokenizer = tiny_students.train_tokenizer()
        self.config = StudentConfig(
            vocab_size=self.tokenizer.size,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=256,
        )

    def make(self, blobs: LocalBlobStore, student_id: str, number: int) -> Files:
        """Writes the files of a release into the store."""
        weights = self._folder / f"{student_id}-{number}.safetensors"
        write_variant(weights, self._tensors(number), self.config, "int8")
        engine = load_engine(weights, threads=1)
        loss = PROBE.mean([sequence_loss(engine, token_ids) for token_ids in PROBE.token_ids])
        variant = ManifestVariant(variant_path(student_id, number, "int8"), weights.stat().st_size, loss)
        manifest = Manifest(student_id, number, self.config.to_hf(), {"int8": variant}, PROBE)
        stored = {
            "int8": blobs.put_file(weights),
            "tokenizer": blobs.put([self.tokenizer.to_bytes()]),
            "manifest": blobs.put([manifest.to_json()]),
        }
        weights.unlink()
        return Files(
            {
                path_of(student_id, number, kind): {"sha256": blob.sha256, "size_bytes": blob.size_bytes, "kind": kind}
                for kind, blob in stored.items()
            }
        )

    def _tensors(self, number: int) -> dict[str, Any]:
        noise = np.random.default_rng(number)
        tensors = {}
        weights = Student.random(self.config, seed=1, std=0.1).state_dict()
        for name in self.config.tensor_shapes():
            tensor = weights[name].float().numpy()
            step = noise.standard_normal(tensor.shape, np.float32) * (_STEP * float(tensor.std()))
            tensors[name] = tensor + step
        return tensors


def insert(registry: Registry, student_id: str, number: int, files: Files) -> None:
    """Leaves a packed release in the registry, as a worker does when its distillation has ended."""
    now = dt.datetime.now(dt.UTC)
    distillation = Distillation(
        id=f"{student_id}-made-{number}",
        student_id=student_id,
        state=DistillationState.SUCCEEDED,
        recipe={},
        mixture={},
        base_release=None,
        round_id=None,
        create_time=now,
        update_time=now,
        release_number=number,
    )
    release = Release(
        student_id=student_id,
        number=number,
        distillation_id=distillation.id,
        state=ReleaseState.PACKED,
        targets=files.targets,
        create_time=now,
    )
    with registry.transaction() as session:
        session.add(distillation)
        session.flush()
        session.add(release)


def ask(address: str, student_id: str, prompts: tuple[str, ...] = PROMPTS) -> tuple[int, Answers]:
    """Asks an agent over HTTP; returns the number of the release that answered, and what it said.

    Raises:
        OSError: nobody answers.
        AssertionError: the agent does not serve the student, or two releases answered.
    """
    numbers, answers = set(), []
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        for prompt in prompts:
            body = {"model": student_id, "prompt": prompt, "max_tokens": 10, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            assert response.status == 200, f"{response.status}: {content[:500]!r}"
            answer = json.loads(content)
            numbers.add(int(answer["model"].rpartition("/")[2]))
            answers.append(answer["choices"][0]["text"])
    finally:
        connection.close()
    if len(numbers) > 1:  # it was swapped between two prompts
        return ask(address, student_id, prompts)
    return numbers.pop(), tuple(answers)


def sha256_of(path: Path) -> str:
    """Hash of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
