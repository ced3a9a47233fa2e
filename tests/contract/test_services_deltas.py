"""Deltas between releases, over real connections: who gets which, how often they are built, what they are good for."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from agent_support import until

from ebbflow.api.v1 import artefact_pb2, release_pb2, resources_pb2
from ebbflow.api.v1.artefact_pb2_grpc import ArtefactServiceStub
from ebbflow.api.v1.release_pb2_grpc import ReleaseServiceStub
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import (
    Assignment,
    Delta,
    DeviceState,
    Release,
    ReleaseState,
    Rollout,
    RolloutDevice,
    RolloutState,
)
from ebbflow.cloud.services import deltas
from ebbflow.common.codes import delta
from ebbflow.common.codes.artefact import Precision, write_variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import path_of

Plane = Any
CONFIG = StudentConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=64,
)


@dataclass
class Builds:
    """What the coder was asked to do."""

    targets: list[str] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Builds]:
    """Counts and, until `go` is set, holds up the real coder."""
    seen, encode = Builds(), delta.encode
    seen.go.set()

    def counted(base: Path, target: Path, out: Path) -> delta.DeltaInfo:
        seen.targets.append(target.name)
        seen.go.wait(60)
        return encode(base, target, out)

    monkeypatch.setattr(delta, "encode", counted)
    yield seen
    seen.go.set()


class Line:
    """A line of releases: each a small step of real codes away from the one before."""

    def __init__(self, plane: Plane, folder: Path, student_id: str = "faq", seed: int = 0) -> None:
        self.plane, self.folder, self.student_id = plane, folder, student_id
        self._random = np.random.default_rng(seed)
        self._weights = {
            name: self._random.normal(0, 0.05, shape).astype(np.float32)
            for name, shape in CONFIG.tensor_shapes().items()
        }
        plane.student(student_id)

    def release(
        self,
        number: int,
        step: float = 1e-4,
        state: ReleaseState = ReleaseState.PUBLISHED,
        kept: tuple[str, ...] = (),
    ) -> dict[str, bytes]:
        """Publishes the next one; returns its files by kind."""
        self._weights = {
            name: (weight + self._random.normal(0, step, weight.shape)).astype(np.float32)
            for name, weight in self._weights.items()
        }
        files = {kind: self._file(number, kind, kept) for kind in ("bf16", "int8", "int4")}
        variants = {
            kind: ManifestVariant(path_of(self.student_id, number, kind), len(data), 1.0)
            for kind, data in files.items()
        }
        config = {**CONFIG.to_hf(), "note": number}
        manifest = Manifest(self.student_id, number, config, variants, Probe(((1, 2),), 0.1), kept).to_json()
        files |= {"manifest": manifest, "tokenizer": b"tokens of %d" % (number // 2)}
        self.plane.release(number, self.student_id, state=state)
        with self.plane.registry.transaction() as session:
            session.get_one(Release, (self.student_id, number)).targets = {
                path_of(self.student_id, number, kind): {
                    "sha256": self.plane.cloud.blobs.put([data]).sha256,
                    "size_bytes": len(data),
                    "kind": kind,
                }
                for kind, data in files.items()
            }
        return files

    def _file(self, number: int, kind: Precision, kept: tuple[str, ...]) -> bytes:
        path = self.folder / f"{self.student_id}-{number}.{kind}"
        write_variant(path, self._weights, CONFIG, kind, kept_bf16=kept)
        return path.read_bytes()

    def agent(self, agent_id: str, serving: int | None = None) -> Any:
        """An agent that was given the student."""
        client = self.plane.agent(agent_id)
        with self.plane.registry.transaction() as session:
            installation = {"precision": "PRECISION_INT8"} if serving else {}
            session.add(
                Assignment(
                    agent_id=agent_id, student_id=self.student_id, serving_number=serving, installation=installation
                )
            )
        return client


@pytest.fixture
def line(plane: Plane, tmp_path: Path) -> Iterator[Line]:
    yield Line(plane, tmp_path)
    plane.cloud.deltas.close()


def sha256(data: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


async def find(client: Any, target: bytes, *bases: bytes, **options: Any) -> list[artefact_pb2.Delta]:
    request = artefact_pb2.FindDeltasRequest(target_sha256=sha256(target), base_sha256=map(sha256, bases))
    answer = await ArtefactServiceStub(client.channel).FindDeltas(request, **{"timeout": 30, **options})
    return list(answer.deltas)


async def read(client: Any, digest: bytes) -> bytes:
    request = artefact_pb2.ReadBlobRequest(sha256=digest)
    return b"".join([answer.chunk async for answer in ArtefactServiceStub(client.channel).ReadBlob(request)])


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
async def test_a_delta_leads_from_one_release_to_the_next_exactly(line: Line, tmp_path: Path, kind: str) -> None:
    old, new = line.release(1), line.release(2)
    agent = line.agent("kiosk-7")
    (offer,) = await find(agent, new[kind], old[kind])
    assert (offer.base_sha256, offer.format) == (sha256(old[kind]), delta.FORMAT)
    fetched = await read(agent, offer.sha256)
    assert (sha256(fetched), len(fetched)) == (offer.sha256, offer.size_bytes)
    assert len(fetched) < 0.9 * len(new[kind])
    base, way, out = tmp_path / "base", tmp_path / "way", tmp_path / "out"
    base.write_bytes(old[kind])
    way.write_bytes(fetched)
    delta.apply(base, way, out, target_size_bytes=len(new[kind]))
    assert out.read_bytes() == new[kind]


async def test_of_several_ways_the_shortest_comes_first_and_strangers_are_left_out(line: Line) -> None:
    far, near, new = line.release(1), line.release(2, step=1e-3), line.release(3)
    agent = line.agent("kiosk-7")
    offers = await find(agent, new["int8"], far["int8"], b"unknown", near["int4"], new["int8"], near["int8"])
    assert [offer.base_sha256 for offer in offers] == [sha256(near["int8"]), sha256(far["int8"])]
    assert offers[0].size_bytes < offers[1].size_bytes
    assert await find(agent, b"unknown", near["int8"]) == []
    assert await find(agent, new["tokenizer"], near["tokenizer"], near["int8"]) == []


async def test_a_request_that_cannot_be_answered_is_refused(line: Line) -> None:
    agent = line.agent("kiosk-7")
    with pytest.raises(EbbflowError) as caught:
        await find(agent, b"target", *(b"%d" % number for number in range(9)))
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_REQUEST, "base_sha256")
    request = artefact_pb2.FindDeltasRequest(target_sha256=bytes(32), base_sha256=[b"short"])
    with pytest.raises(EbbflowError) as caught:
        await ArtefactServiceStub(agent.channel).FindDeltas(request)
    assert caught.value.reason is Reason.INVALID_REQUEST


async def test_an_agent_neither_finds_nor_reads_the_deltas_of_another_student(
    line: Line, tmp_path: Path, builds: Builds
) -> None:
    old, new = line.release(1), line.release(2)
    (offer,) = await find(line.agent("kiosk-7"), new["int8"], old["int8"])
    other = Line(line.plane, tmp_path, "other", seed=1)
    own = other.release(1)
    stranger = other.agent("kiosk-8")
    assert await find(stranger, new["int8"], old["int8"]) == []
    assert await find(stranger, own["int8"], old["int8"]) == []
    assert len(builds.targets) == 1
    with pytest.raises(EbbflowError) as caught:
        await read(stranger, offer.sha256)
    assert caught.value.reason is Reason.BLOB_NOT_FOUND
    assert await read(line.plane.admin("viewer"), offer.sha256)


@pytest.mark.parametrize("revoked", [1, 2])
@pytest.mark.parametrize("state", [ReleaseState.REVOKED, ReleaseState.RETIRED, ReleaseState.PROPOSED])
async def test_what_is_not_in_the_signed_list_is_served_to_no_agent(
    line: Line, revoked: int, state: ReleaseState
) -> None:
    releases = [line.release(1), line.release(2)]
    agent = line.agent("kiosk-7")
    (offer,) = await find(agent, releases[1]["int8"], releases[0]["int8"])
    with line.plane.registry.transaction() as session:
        session.get_one(Release, ("faq", revoked)).state = state
    assert await find(agent, releases[1]["int8"], releases[0]["int8"]) == []
    for digest in (offer.sha256, sha256(releases[revoked - 1]["int8"])):
        with pytest.raises(EbbflowError) as caught:
            await read(agent, digest)
        assert caught.value.reason is Reason.BLOB_NOT_FOUND
    assert await read(agent, sha256(releases[2 - revoked]["int8"])) == releases[2 - revoked]["int8"]


async def test_many_who_ask_at_once_cost_one_build(line: Line, builds: Builds) -> None:
    old, new = line.release(1), line.release(2)
    agents = [line.agent(f"kiosk-{number}") for number in range(6)]
    builds.go.clear()
    asking = [asyncio.create_task(find(agent, new["int8"], old["int8"])) for agent in agents]
    await until(lambda: builds.targets)
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in asking)
    # The file threads are free meanwhile.
    assert await read(agents[0], sha256(new["int8"])) == new["int8"]
    builds.go.set()
    answers = await asyncio.gather(*asking)
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]) == len(builds.targets) == 1


async def test_who_has_no_time_takes_the_full_file_and_the_next_one_finds_the_delta(
    line: Line, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = line.release(1), line.release(2)
    agent = line.agent("kiosk-7")
    builds.go.clear()
    monkeypatch.setattr(deltas, "ANSWER_S", 28.0)  # however slow this machine is, the answer has its way back
    assert await find(agent, new["int8"], old["int8"], timeout=30.0) == []
    builds.go.set()
    assert len(await find(agent, new["int8"], old["int8"])) == len(builds.targets) == 1


async def test_a_delta_that_saves_nothing_is_remembered_and_not_offered(line: Line, builds: Builds) -> None:
    old, new = line.release(1), line.release(2, step=10.0)
    agent = line.agent("kiosk-7")
    for _ in range(2):
        assert await find(agent, new["int8"], old["int8"]) == []
    assert len(builds.targets) == 1
    with line.plane.registry.reading() as session:
        row = session.scalars(sa.select(Delta)).one()
    assert row.blob_sha256 is None
    assert row.size_bytes > 0.9 * len(new["int8"])


async def test_files_that_are_no_artefacts_have_no_delta(line: Line, builds: Builds) -> None:
    line.plane.release(1, content=b"weights of old")
    line.plane.release(2, content=b"weights of new")
    agent = line.agent("kiosk-7")
    for _ in range(2):
        assert await find(agent, b"weights of new", b"weights of old") == []
    assert len(builds.targets) == 1


async def test_a_lost_delta_is_built_again(line: Line, builds: Builds) -> None:
    old, new = line.release(1), line.release(2)
    agent = line.agent("kiosk-7")
    (offer,) = await find(agent, new["int8"], old["int8"])
    (line.plane.cloud.blobs.folder / offer.sha256.hex()[:2] / offer.sha256.hex()).unlink()
    assert await find(agent, new["int8"], old["int8"]) == [offer]
    assert sha256(await read(agent, offer.sha256)) == offer.sha256
    assert len(builds.targets) == 2


async def test_a_damaged_file_gives_no_delta_and_is_left_alone_for_a_while(line: Line, builds: Builds) -> None:
    old, new = line.release(1), line.release(2)
    agent = line.agent("kiosk-7")
    digest = sha256(old["int8"]).hex()
    (line.plane.cloud.blobs.folder / digest[:2] / digest).write_bytes(b"damaged")
    assert await find(agent, new["int8"], old["int8"]) == []
    (line.plane.cloud.blobs.folder / digest[:2] / digest).write_bytes(old["int8"])
    assert await find(agent, new["int8"], old["int8"]) == []
    line.plane.cloud.deltas._now_s = lambda: time.monotonic() + 601
    assert len(await find(agent, new["int8"], old["int8"])) == len(builds.targets) == 1
    assert list((line.plane.cloud.settings.home / "scratch").iterdir()) == []


async def test_deltas_of_a_rollout_are_built_before_anybody_asks(line: Line, builds: Builds) -> None:
    old, new = line.release(1), line.release(2)
    agent = line.agent("kiosk-7", serving=1)
    with line.plane.registry.transaction() as session:
        rollout: dict[str, Any] = {
            "id": "r",
            "student_id": "faq",
            "release_number": 2,
            "state": RolloutState.RUNNING,
            "phases": [{}],
        }
        session.add(Rollout(**rollout, create_time=now(), update_time=now()))
        session.flush()
        device: dict[str, Any] = {"rollout_id": "r", "agent_id": "kiosk-7", "phase": 0, "state": DeviceState.WAITING}
        session.add(RolloutDevice(**device, previous_number=1))
    for _ in range(2):
        await asyncio.to_thread(deltas.prepare, line.plane.cloud)
    await until(lambda: _built(line.plane))
    assert len(await find(agent, new["int8"], old["int8"])) == len(builds.targets) == 1
    await asyncio.to_thread(deltas.prepare, line.plane.cloud)
    assert len(builds.targets) == 1


def _built(plane: Plane) -> int:
    with plane.registry.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Delta)) or 0


async def test_a_comparison_says_what_changed_and_what_it_costs(line: Line) -> None:
    old, new = line.release(1), line.release(2)
    with line.plane.registry.transaction() as session:
        session.get_one(Release, ("faq", 1)).card = {"bitsPerByte": [1.5]}
        session.get_one(Release, ("faq", 2)).state = ReleaseState.REJECTED
    request = release_pb2.CompareReleasesRequest(base="students/faq/releases/1", target="students/faq/releases/2")
    answer = await ReleaseServiceStub(line.plane.admin("viewer").channel).CompareReleases(request, timeout=60)
    assert [change.precision for change in answer.variants] == [
        resources_pb2.PRECISION_BF16,
        resources_pb2.PRECISION_INT8,
        resources_pb2.PRECISION_INT4,
    ]
    for change, kind in zip(answer.variants, ("bf16", "int8", "int4"), strict=True):
        assert change.full_bytes == len(new[kind])
        assert 0 < change.delta_bytes < 0.9 * len(new[kind])
        assert 0 < change.changed_share <= 1
    assert {change.tensor for change in answer.tensors} <= CONFIG.tensor_shapes().keys()
    assert sorted(answer.tensors, key=lambda change: -change.rms_steps) == list(answer.tensors)
    assert answer.tensors[0].rms_steps > 0
    assert answer.tokenizer_changed
    assert list(answer.configuration) == ["note: 1 -> 2"]
    assert list(answer.base_card.bits_per_byte) == [1.5]
    assert old["int8"] != new["int8"]


async def test_a_comparison_names_the_matrices_that_are_kept_in_bf16(line: Line) -> None:
    kept = ("model.embed_tokens.weight",)
    line.release(1)
    line.release(2, kept=kept)
    request = release_pb2.CompareReleasesRequest(base="students/faq/releases/1", target="students/faq/releases/2")
    answer = await ReleaseServiceStub(line.plane.admin("viewer").channel).CompareReleases(request, timeout=60)
    assert list(answer.configuration) == [f"kept_bf16: not set -> {kept[0]}", "note: 1 -> 2"]
    found = {change.tensor: change for change in answer.tensors}
    assert found[kept[0]].changed_share > 0.99, "codes and bfloat16 have nothing in common"
    assert found.keys() == CONFIG.tensor_shapes().keys()


async def test_a_release_differs_in_nothing_from_itself(line: Line) -> None:
    line.release(1)
    name = "students/faq/releases/1"
    request = release_pb2.CompareReleasesRequest(base=name, target=name)
    answer = await ReleaseServiceStub(line.plane.admin("viewer").channel).CompareReleases(request)
    assert [change.changed_share for change in answer.variants] == [0, 0, 0]
    assert not answer.tensors
    assert not answer.tokenizer_changed
    assert not answer.configuration


async def test_a_comparison_that_makes_no_sense_is_refused(
    line: Line, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    line.release(1)
    line.release(2)
    stub = ReleaseServiceStub(line.plane.admin("viewer").channel)
    for base, target, reason in (
        ("students/faq/releases/1", "students/faq/releases/9", Reason.RELEASE_NOT_FOUND),
        ("students/faq/releases/1", "students/other/releases/1", Reason.INVALID_REQUEST),
        ("students/faq", "students/faq/releases/1", Reason.INVALID_REQUEST),
    ):
        with pytest.raises(EbbflowError) as caught:
            await stub.CompareReleases(release_pb2.CompareReleasesRequest(base=base, target=target))
        assert caught.value.reason is reason
    builds.go.clear()
    monkeypatch.setattr(deltas, "ANSWER_S", 28.0)  # however slow this machine is, the answer has its way back
    request = release_pb2.CompareReleasesRequest(base="students/faq/releases/1", target="students/faq/releases/2")
    with pytest.raises(EbbflowError) as caught:
        await stub.CompareReleases(request, timeout=30.0)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert "ask again" in str(caught.value)
