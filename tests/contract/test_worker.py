"""From a queued distillation to a published or rejected release, on real parts."""

import dataclasses
import datetime as dt
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sqlalchemy as sa
import tiny_models
import torch
from distillation_world import add_student, job_of, queue, release_of, sha256_of, worker_of

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.distillation.endings import Stopping
from ebbflow.cloud.distillation.worker import Worker
from ebbflow.cloud.processes.gate import Gate
from ebbflow.cloud.processes.work import propose
from ebbflow.cloud.registry import clock, jobs
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Distillation, DistillationState, Release, ReleaseState, Student
from ebbflow.cloud.release import gate, keys, packing, publish, repository
from ebbflow.common.codes.artefact import read_variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.common.trust.manifest import Manifest

MakeWorker = Callable[..., Worker]
LIMITS = gate.Limits(regression=0.25, precision_loss=0.25)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_moe_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def is_proposed(registry: Registry, number: int) -> bool:
    with registry.reading() as session:
        release = session.get(Release, ("faq", number))
        return release is not None and release.state is ReleaseState.PROPOSED


def test_a_queued_distillation_becomes_a_published_release(
    registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(registry, blobs, str(teacher))
    queue(registry, feedback_epsilon=4.0)
    worker = worker_of(registry, blobs, tmp_path)
    assert worker.run_once()
    assert not worker.run_once()
    job, release = job_of(registry), release_of(registry)
    assert (job.state, job.release_number, job.error) == (DistillationState.SUCCEEDED, 1, "")
    assert job.step == job.recipe["steps"]
    assert job.loss > 0
    assert release.state is ReleaseState.PACKED
    assert not list((tmp_path / "work").iterdir())
    manifest = Manifest.from_json(blobs.read(sha256_of(release, "manifest")))
    assert (manifest.student, manifest.release, set(manifest.variants)) == ("faq", 1, {"bf16", "int8", "int4"})
    tokenizer = Tokenizer.from_bytes(blobs.read(sha256_of(release, "tokenizer")))
    assert tokenizer.to_bytes() == tiny_models.tokenizer().to_bytes()

    keys.create(tmp_path / "keys")
    with registry.transaction() as session:
        repository.initialise(session, tmp_path / "keys", clock.now())
    propose(registry, keys.load(tmp_path / "keys", "distiller"))
    keeper = Gate(registry, blobs, keys.load(tmp_path / "keys", "gate"), LIMITS, tmp_path / "gate")
    assert keeper.run_once()
    assert not keeper.run_once()
    with registry.transaction() as session:
        assert publish.publish(session, keys.load(tmp_path / "keys", "online"))
    release = release_of(registry)
    assert (release.state, release.reason) == (ReleaseState.PUBLISHED, "")
    assert len(release.card["bitsPerByte"]) == len(release.card["probeLoss"]) == 3
    assert set(release.card["topicBitsPerByte"]) == set(tiny_models.TOPICS)
    assert release.card["feedbackEpsilon"] == 4.0


def test_the_same_order_gives_the_same_weights_and_a_base_goes_on_from_them(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    for job_id, base in (("one", None), ("two", None), ("three", 1)):
        queue(sqlite_registry, job_id, base_release=base)
    worker = worker_of(sqlite_registry, blobs, tmp_path)
    for _ in range(3):
        assert worker.run_once()
    first, second, third = (release_of(sqlite_registry, number) for number in (1, 2, 3))
    assert sha256_of(first, "int4") == sha256_of(second, "int4") != sha256_of(third, "int4")
    assert sha256_of(first, "tokenizer") == sha256_of(third, "tokenizer")
    assert job_of(sqlite_registry, "three").release_number == 3


def test_a_student_with_a_vocabulary_of_its_own_learns_from_text_alone(
    sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/no/teacher/is/asked", vocabulary_size=300)
    queue(sqlite_registry, recipe={"kl_weight": 0.0})
    assert worker_of(sqlite_registry, blobs, tmp_path).run_once()
    job = job_of(sqlite_registry)
    assert (job.state, job.error) == (DistillationState.SUCCEEDED, "")


def _failure(registry: Registry, blobs: LocalBlobStore, folder: Path) -> str:
    assert worker_of(registry, blobs, folder).run_once()
    job = job_of(registry)
    assert job.state is DistillationState.FAILED
    assert "Traceback" not in job.error
    return job.error


def test_an_unknown_teacher_fails_with_its_cure(
    sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, "/nowhere/to/be/found")
    queue(sqlite_registry)
    error = _failure(sqlite_registry, blobs, tmp_path)
    assert error.startswith("CHECKPOINT_UNREADABLE: ")
    assert "/nowhere/to/be/found" in error
    assert Reason.CHECKPOINT_UNREADABLE.value.cure in error


def test_a_teacher_that_cuts_text_otherwise_fails_with_its_cure(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher), vocabulary_size=280)
    queue(sqlite_registry)
    assert _failure(sqlite_registry, blobs, tmp_path).startswith("TEACHER_MISMATCH: ")


def test_a_corrupt_corpus_fails_with_the_line(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    broken = blobs.put([b'{"topic": "sea", "text": "waves"}\n', b"nonsense\n"]).sha256
    with sqlite_registry.transaction() as session:
        session.execute(sa.update(Student).values(corpus_sha256=broken))
    queue(sqlite_registry)
    error = _failure(sqlite_registry, blobs, tmp_path)
    assert error.startswith("CORPUS_INVALID: line 2")
    assert "nonsense" not in error


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"mixture": {"moon": 1.0}}, "moon"),
        ({"recipe": {"sequence_length": 65}}, "sequence_length"),
        ({"recipe": {"steps": 0}}, "steps"),
        ({"base_release": 9}, "students/faq/releases/9"),
        ({"recipe": {"keep_bf16": ["lm_head.*"]}}, "'lm_head.*', which is the name of no matrix"),
    ],
)
def test_an_impossible_order_fails_with_the_field(
    fields: dict[str, Any], word: str, sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    queue(sqlite_registry, **fields)
    assert word in _failure(sqlite_registry, blobs, tmp_path)


def test_a_full_disk_is_named_with_its_cure_and_the_job_goes_on_when_there_is_space(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    queue(sqlite_registry)
    save = torch.save

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    worker = worker_of(sqlite_registry, blobs, tmp_path)
    assert worker.run_once()
    job = job_of(sqlite_registry)
    assert job.state is DistillationState.RUNNING
    assert job.error.startswith("DISK_FULL: ")
    assert Reason.DISK_FULL.value.cure in job.error
    assert not worker.run_once(), "it waits for its lease to run out"

    monkeypatch.setattr(torch, "save", save)
    with sqlite_registry.transaction() as session:
        session.execute(sa.update(Distillation).values(leased_until=clock.now() - dt.timedelta(seconds=1)))
    assert worker.run_once()
    job = job_of(sqlite_registry)
    assert (job.state, job.error, job.attempt) == (DistillationState.SUCCEEDED, "", 2)


def test_an_unforeseen_failure_leaks_no_text(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    queue(sqlite_registry)

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a secret of the corpus")

    monkeypatch.setattr("ebbflow.cloud.distillation.worker.pack_weights", broken)
    error = _failure(sqlite_registry, blobs, tmp_path)
    assert "KeyError" in error
    assert "secret" not in error


def test_a_job_that_was_cancelled_is_let_go_and_its_folder_swept(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    queue(sqlite_registry, recipe={"steps": 100_000})
    worker = worker_of(sqlite_registry, blobs, tmp_path, lease_s=1.2, checkpoint_interval_s=0.0)
    thread = threading.Thread(target=worker.run_once, daemon=True)
    thread.start()
    _until(lambda: job_of(sqlite_registry).step > 0)
    with sqlite_registry.transaction() as session:
        session.execute(sa.update(Distillation).values(state=DistillationState.CANCELLED))
    thread.join(120)
    assert not thread.is_alive()
    assert job_of(sqlite_registry).state is DistillationState.CANCELLED
    assert (tmp_path / "work" / "one").exists()
    worker.sweep()
    assert not (tmp_path / "work" / "one").exists()


def test_progress_reaches_the_registry(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    queue(sqlite_registry, recipe={"steps": 100_000})
    stop = threading.Event()
    worker = worker_of(sqlite_registry, blobs, tmp_path, lease_s=1.2, stopping=stop.is_set)

    def run() -> None:
        with pytest.raises(Stopping):
            worker.run_once()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    _until(lambda: job_of(sqlite_registry).step > 0)
    job = job_of(sqlite_registry)
    stop.set()
    thread.join(120)
    assert job.loss > 0
    assert job.tokens_per_second > 0
    assert job.eta_time is not None
    assert job.eta_time > clock.now()


def test_a_worker_that_stops_gives_its_job_to_the_next_which_ends_alike(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    queue(sqlite_registry, "whole")
    worker_of(sqlite_registry, blobs, tmp_path).run_once()
    queue(sqlite_registry, "split")
    steps = iter([False, False, True])
    with pytest.raises(Stopping):
        worker_of(sqlite_registry, blobs, tmp_path, stopping=lambda: next(steps)).run_once()
    assert job_of(sqlite_registry, "split").state is DistillationState.RUNNING
    assert job_of(sqlite_registry, "split").step == 3
    assert worker_of(sqlite_registry, blobs, tmp_path, name="other").run_once()
    job = job_of(sqlite_registry, "split")
    assert (job.state, job.attempt) == (DistillationState.SUCCEEDED, 2)
    whole, split = release_of(sqlite_registry, 1), release_of(sqlite_registry, 2)
    assert sha256_of(whole, "bf16") == sha256_of(split, "bf16")


def scales_of(release: Release, blobs: LocalBlobStore, path: Path) -> npt.NDArray[np.float16]:
    blobs.fetch(sha256_of(release, "int8"), path)
    variant = read_variant(path)
    return np.concatenate([array.ravel() for name, array in variant.tensors.items() if name.endswith(".scales")])


def test_a_release_keeps_the_scales_of_the_release_that_it_begins_from(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    recipe = {"learning_rate": 1e-5}
    queue(sqlite_registry, "first")
    queue(sqlite_registry, "with", base_release=1, recipe=recipe)
    queue(sqlite_registry, "without", recipe=recipe)
    worker = worker_of(sqlite_registry, blobs, tmp_path)
    assert all(worker.run_once() for _ in range(3))
    base, kept, fresh = (scales_of(release_of(sqlite_registry, n), blobs, tmp_path / "int8") for n in (1, 2, 3))
    assert float((kept == base).mean()) > 0.99
    assert float((fresh == base).mean()) < 0.6


def test_the_neighbour_of_a_release_is_its_base_or_the_newest_published_one(
    registry: Registry, blobs: LocalBlobStore
) -> None:
    add_student(registry, blobs, "teacher")
    states = [ReleaseState.PUBLISHED, ReleaseState.PUBLISHED, ReleaseState.REVOKED, ReleaseState.PACKED]
    queue(registry, "job")
    with registry.transaction() as session:
        job = session.get_one(Distillation, "job")
        assert packing.neighbour(session, job) is None
    for number, state in enumerate(states, 1):
        queue(registry, f"of{number}")
        targets = {
            kind: {"sha256": f"{kind}{number}", "size_bytes": 1, "kind": kind} for kind in ("bf16", "int8", "int4")
        }
        with registry.transaction() as session:
            session.add(
                Release(
                    student_id="faq",
                    number=number,
                    distillation_id=f"of{number}",
                    state=state,
                    targets=targets,
                    create_time=clock.now(),
                )
            )
    with registry.transaction() as session:
        job = session.get_one(Distillation, "job")
        assert packing.neighbour(session, job) == "int82"
        job.base_release = 1
        assert packing.neighbour(session, job) == "int81"
        job.base_release = 4
        assert packing.neighbour(session, job) == "int84"


def test_a_worker_that_was_overtaken_publishes_nothing(
    registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_student(registry, blobs, str(teacher))
    queue(registry)
    slow = worker_of(registry, blobs, tmp_path, lease_s=1000.0)
    from ebbflow.cloud.distillation import worker as module

    numbered = packing.number_files

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "number_files", numbered)
        with registry.transaction() as session:
            session.execute(sa.update(Distillation).values(leased_until=clock.now() - dt.timedelta(seconds=1)))
        assert worker_of(registry, blobs, tmp_path / "elsewhere", name="fast").run_once()
        return numbered(*arguments)

    monkeypatch.setattr(module, "number_files", overtaken)
    assert slow.run_once()
    with registry.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Release)) == 1
    job = job_of(registry)
    assert (job.state, job.attempt, job.release_number) == (DistillationState.SUCCEEDED, 2, 1)


def test_two_distillations_that_end_at_once_get_two_numbers(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    queue(sqlite_registry, "one")
    queue(sqlite_registry, "two")
    from ebbflow.cloud.distillation import worker as module

    numbered = packing.number_files

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "number_files", numbered)
        assert worker_of(sqlite_registry, blobs, tmp_path / "elsewhere").run_once()
        return numbered(*arguments)

    monkeypatch.setattr(module, "number_files", meanwhile)
    assert worker_of(sqlite_registry, blobs, tmp_path).run_once()
    assert (job_of(sqlite_registry, "two").release_number, job_of(sqlite_registry, "one").release_number) == (1, 2)
    manifest = Manifest.from_json(blobs.read(sha256_of(release_of(sqlite_registry, 2), "manifest")))
    assert manifest.release == 2


def test_a_lease_that_another_worker_took_over_stops_the_training(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    queue(sqlite_registry, recipe={"steps": 100_000})
    worker = worker_of(sqlite_registry, blobs, tmp_path, lease_s=1.2)
    thread = threading.Thread(target=worker.run_once, daemon=True)
    thread.start()
    _until(lambda: job_of(sqlite_registry).step > 0)
    with sqlite_registry.transaction() as session:
        session.execute(sa.update(Distillation).values(leased_until=clock.now() - dt.timedelta(seconds=1)))
        assert jobs.claim(session, "thief", clock.now(), dt.timedelta(hours=1)) is not None
    thread.join(120)
    assert not thread.is_alive()
    job = job_of(sqlite_registry)
    assert (job.state, job.leased_by) == (DistillationState.RUNNING, "thief")


@pytest.mark.slow
def test_a_worker_process_that_is_killed_is_followed_by_another_with_the_same_result(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    add_student(sqlite_registry, blobs, str(teacher))
    recipe = {"steps": 400, "batch_size": 8}
    queue(sqlite_registry, "killed", recipe=recipe)
    keys.create(tmp_path / "keys")
    with sqlite_registry.transaction() as session:
        repository.initialise(session, tmp_path / "keys", clock.now())
        (tmp_path / "trust").mkdir()
        write_atomic(tmp_path / "trust" / "root.json", repository.trust_root(session))
    script = (
        "import sys; from pathlib import Path; from ebbflow.cloud.processes import settings, work;"
        "work.run(settings.CloudSettings.load(Path(sys.argv[1]), threads=1, lease_s=1.5,"
        " checkpoint_interval_s=0.2, tick_interval_s=0.1))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as first:
        try:
            _until(lambda: job_of(sqlite_registry, "killed").step > 10)
        finally:
            first.kill()
    assert 0 < job_of(sqlite_registry, "killed").step < 400
    queue(sqlite_registry, "whole", recipe=recipe)
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as second:
        try:
            _until(lambda: is_proposed(sqlite_registry, 1))
            _until(lambda: job_of(sqlite_registry, "whole").state is DistillationState.SUCCEEDED)
            second.terminate()
            assert second.wait(60) == 0
        finally:
            second.kill()
    killed, whole = job_of(sqlite_registry, "killed"), job_of(sqlite_registry, "whole")
    assert (killed.attempt, whole.attempt) == (2, 1)
    releases = [release_of(sqlite_registry, job.release_number or 0) for job in (killed, whole)]
    assert sha256_of(releases[0], "bf16") == sha256_of(releases[1], "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("registry_url", ["postgresql"], indirect=True)  # SQLite has a name for what is provoked here
def test_a_worker_process_whose_proposer_fails_ends_with_an_error(
    registry: Registry, registry_url: str, tmp_path: Path
) -> None:
    keys.create(tmp_path / "keys")
    with registry.transaction() as session:
        repository.initialise(session, tmp_path / "keys", clock.now())
        (tmp_path / "trust").mkdir()
        write_atomic(tmp_path / "trust" / "root.json", repository.trust_root(session))
        session.execute(sa.text("DROP TABLE trust_metadata"))  # which the proposer reads, and distilling does not
    command = [sys.executable, "-m", "ebbflow.cli.main", "cloud", "work", "--home", str(tmp_path)]
    settings = {"EBBFLOW_REGISTRY_URL": registry_url, "EBBFLOW_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert "the proposer ends this process: unhandled ProgrammingError" in ended.stderr


def _until(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {limit_s:.0f} s"
        time.sleep(0.02)


def _published(
    registry: Registry,
    blobs: LocalBlobStore,
    teacher: Path,
    folder: Path,
    spoil: Callable[[Release], None],
    **recipe: Any,
) -> Release:
    """Distils, spoils what was packed, and lets distiller and gate look at it."""
    add_student(registry, blobs, str(teacher))
    queue(registry, recipe=recipe)
    worker_of(registry, blobs, folder).run_once()
    with registry.transaction() as session:
        release = session.get_one(Release, ("faq", 1))
        spoil(release)
        session.execute(sa.update(Release).values(targets=release.targets))
    keys.create(folder / "keys")
    with registry.transaction() as session:
        repository.initialise(session, folder / "keys", clock.now())
    propose(registry, keys.load(folder / "keys", "distiller"))
    keeper = Gate(registry, blobs, keys.load(folder / "keys", "gate"), LIMITS, folder / "gate")
    assert keeper.run_once()
    assert not keeper.run_once()
    return release_of(registry)


def test_the_gate_turns_down_weights_that_are_not_those_of_the_manifest(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    def spoil(release: Release) -> None:
        file = next(file for file in release.targets.values() if file["kind"] == "int8")
        data = bytearray(blobs.read(file["sha256"]))
        half = len(data) // 2
        data[half:] = bytes(len(data) - half)
        file["sha256"] = blobs.put([bytes(data)]).sha256

    release = _published(sqlite_registry, blobs, teacher, tmp_path, spoil)
    assert release.state is ReleaseState.REJECTED
    assert "int8" in release.reason


def test_the_gate_turns_down_weights_that_keep_other_matrices_than_the_manifest_says(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    def spoil(release: Release) -> None:
        file = next(file for file in release.targets.values() if file["kind"] == "manifest")
        manifest = Manifest.from_json(blobs.read(file["sha256"]))
        blob = blobs.put([dataclasses.replace(manifest, kept_bf16=("model.embed_tokens.weight",)).to_json()])
        file |= {"sha256": blob.sha256, "size_bytes": blob.size_bytes}

    release = _published(sqlite_registry, blobs, teacher, tmp_path, spoil)
    assert release.state is ReleaseState.REJECTED
    assert "bf16 keeps other matrices in bf16 than the manifest says" in release.reason


def test_a_release_with_sensitive_matrices_is_published(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    names: list[tuple[str, ...]] = []

    def look(release: Release) -> None:
        names.append(Manifest.from_json(blobs.read(sha256_of(release, "manifest"))).kept_bf16)
        blobs.fetch(sha256_of(release, "int4"), tmp_path / "int4")
        names.append(read_variant(tmp_path / "int4").kept_bf16)

    _published(sqlite_registry, blobs, teacher, tmp_path, look, keep_bf16=["*.1.self_attn.o_proj.*"])
    with sqlite_registry.transaction() as session:
        assert publish.publish(session, keys.load(tmp_path / "keys", "online"))
    release = release_of(sqlite_registry)
    assert (release.state, release.reason) == (ReleaseState.PUBLISHED, "")
    assert names == [("model.layers.1.self_attn.o_proj.weight",)] * 2


def test_the_gate_turns_down_a_file_that_is_no_artefact(
    sqlite_registry: Registry, blobs: LocalBlobStore, teacher: Path, tmp_path: Path
) -> None:
    def spoil(release: Release) -> None:
        file = next(file for file in release.targets.values() if file["kind"] == "bf16")
        file["sha256"] = blobs.put([bytes(file["size_bytes"])]).sha256

    release = _published(sqlite_registry, blobs, teacher, tmp_path, spoil)
    assert release.state is ReleaseState.REJECTED
    assert release.reason


def test_a_registry_that_is_down_is_told_to_the_caller(
    sqlite_registry: Registry, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    (tmp_path / "registry.db").unlink()
    (tmp_path / "registry.db").mkdir()
    sqlite_registry.close()
    with pytest.raises(EbbflowError) as caught:
        worker_of(sqlite_registry, blobs, tmp_path).run_once()
    assert caught.value.reason is Reason.DATABASE_UNAVAILABLE
