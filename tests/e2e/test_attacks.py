"""What a hostile cloud, or a thief of keys, can do to a device: nothing but keep it from updating.

A real control plane with real listeners, certificates and signatures, whose blobs and registry an attacker has in hand,
and a real agent beside it. Every attack must be refused, the release before it must go on answering, and the cloud must
hear why.
"""

import datetime as dt
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny_students
from agent_support import alive, enrolled, until
from agent_world import CloudWorld
from securesystemslib.signer import CryptoSigner
from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Release, ReleaseState
from ebbflow.cloud.release import intake, keys, publish, repository, withdraw
from ebbflow.common.codes.artefact import Precision, write_variant
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.common.trust import ceremony, roles
from ebbflow.common.trust.ceremony import Changes
from ebbflow.common.trust.targets import path_of
from ebbflow.edge.agent.runtime import Agent
from ebbflow.edge.agent.waiting import Backoff, Pace

pytestmark = pytest.mark.slow

LIMIT_S = 40.0
DAY = dt.timedelta(days=1)


class Bent:
    """A file whose bytes somebody changes on their way out."""

    def __init__(self, reader: Any, bend: Callable[[bytes], bytes]) -> None:
        self._reader, self._bend = reader, bend

    def read(self, size_bytes: int, /) -> bytes:
        return self._bend(self._reader.read(size_bytes))

    def close(self) -> None:
        self._reader.close()


class Slow:
    """A file that comes one byte now and then, or nothing at all, until it is released."""

    def __init__(self, reader: Any, released: threading.Event, trickle: bool) -> None:
        self._reader, self._released, self._trickle = reader, released, trickle

    def read(self, size_bytes: int, /) -> bytes:
        if self._released.wait(0.1 if self._trickle else LIMIT_S):
            return bytes(self._reader.read(size_bytes))
        return bytes(self._reader.read(1))

    def close(self) -> None:
        self._reader.close()


@dataclass
class EvilBlobs:
    """The cloud's blob store in an attacker's hands."""

    store: Any
    bend: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    """By SHA-256: what becomes of each chunk."""
    every: Callable[[bytes], bytes] | None = None
    """What becomes of the chunks of files that no release lists, such as deltas."""
    known: frozenset[str] = frozenset()
    slow: dict[str, tuple[threading.Event, bool]] = field(default_factory=dict)
    """By SHA-256: files that come slowly, or not at all."""
    asked: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def reader(self, sha256: str, offset_bytes: int = 0) -> Any:
        self.asked.append(sha256)
        bend = self.bend.get(sha256) or (self.every if sha256 not in self.known else None)
        reader = self.store.reader(sha256, offset_bytes)
        if sha256 in self.slow:
            return Slow(reader, *self.slow[sha256])
        return Bent(reader, bend) if bend else reader


class Scene:
    """A device that serves release 1, and the cloud in whose place the attacker acts."""

    def __init__(self, world: CloudWorld, agent: Agent, name: str) -> None:
        self.world, self.agent, self.name = world, agent, name
        self.signers = {key: keys.load(world.settings.paths.keys, key) for key in keys.NAMES}
        self.blobs = EvilBlobs(world.cloud.blobs)
        world.cloud.blobs = self.blobs

    @property
    def serving(self) -> list[str]:
        return [model.release for model in self.agent.hub.models()]

    def serves(self, number: int) -> bool:
        return self.serving == [f"students/faq/releases/{number}"]

    async def install(self, number: int) -> None:
        self.world.assign(self.name, number)
        await until(lambda: self.serves(number), LIMIT_S)

    async def refused(self, number: int, *reasons: str, still: int = 1) -> None:
        """Tells the device to serve a release; it says why it does not, and answers with the one that it has."""
        self.world.assign(self.name, number)
        await until(lambda: self._reported(number) in reasons, LIMIT_S)
        await self.answers(still)

    async def answers(self, number: int) -> None:
        assert self.serves(number)
        async with openai.AsyncOpenAI(base_url=self.agent.endpoints.http, api_key="none", max_retries=0) as client:
            answer = await client.completions.create(model="faq", prompt="How do", max_tokens=3)
        assert answer.model == f"students/faq/releases/{number}"

    def _reported(self, number: int) -> str:
        said = self.world.assignment(self.name).installation
        about = said.get("release") == f"students/faq/releases/{number}"
        return str(said.get("reason", "")) if about else ""

    def act(self, work: Callable[[Session], Any]) -> Any:
        """Writes to the registry, as somebody who has taken it over."""
        with self.world.cloud.registry.transaction() as session:
            return work(session)

    def content(self, role: str) -> bytes:
        return bytes(self.act(lambda session: repository.required(session, role).content))

    def rewrite(self, role: str, content: bytes) -> None:
        def work(session: Session) -> None:
            repository.required(session, role).content = content

        self.act(work)

    def student(self) -> Targets:
        student: Targets = self.act(repository.trusted).student
        return student

    def sha256(self, number: int, kind: str) -> str:
        return str(self.student().targets[path_of("faq", number, kind)].hashes["sha256"])

    def forge(self, student: Targets, *stolen: str) -> None:
        """Serves a list of releases signed by stolen keys, under snapshot and timestamp of a stolen online key."""
        student.version += 1
        content = repository.signed(student, *(self.signers[name] for name in stolen))

        def work(session: Session) -> None:
            repository.store(session, roles.STUDENT, student.version, content, now=now())
            repository.sign_online(session, self.signers["online"], now())

        self.act(work)

    def hold(self, role: str, changes: Changes, *signed_by: str) -> None:
        """A ceremony, published by the cloud's owner."""
        base = ceremony.read(self.content(role), role)
        staged = ceremony.read(ceremony.stage(base, changes, now()), role)
        for name in signed_by:
            ceremony.add_signature(staged, self.signers[name])
        online = self.world.cloud.online_signer
        self.act(lambda session: intake.accept(session, staged.to_bytes(), online, now()))

    def replace_online_key(self) -> None:
        """Root 2 puts a fresh online key in the place of a stolen one, and the control plane starts with it."""
        old, new = self.signers["online"], CryptoSigner.generate_ed25519()
        changes = Changes(replace=[(old.public_key.keyid, new.public_key)])
        self.hold("root", changes, "root-1", "root-2")
        self.signers["online"] = self.world.signers["online"] = new
        self.world.cloud.online_signer = new
        assert self.act(lambda session: publish.refresh_online(session, new))


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    """The device serves release 1; release 2 is published and nobody has told it."""
    world = CloudWorld(tmp_path)
    async with world.running():
        settings = world.device()
        name = await enrolled(world, settings)
        world.student()
        world.publish(1)
        async with alive(settings) as agent:
            made = Scene(world, agent, name)
            await made.install(1)
            world.publish(2)
            yield made


def flip(chunk: bytes) -> bytes:
    return chunk and bytes([chunk[0] ^ 1]) + chunk[1:]


def halve(chunk: bytes) -> bytes:
    return chunk[: len(chunk) // 2]


def nothing(_chunk: bytes) -> bytes:
    return b""


def endless(chunk: bytes) -> bytes:
    return chunk or b"x" * 4096


@pytest.mark.parametrize("bend", [flip, halve, nothing, endless])
@pytest.mark.parametrize("kind", ["int8", "manifest"])  # the tokenizer is release 1's, and is not fetched again
async def test_files_that_are_not_the_signed_ones(scene: Scene, kind: str, bend: Callable[[bytes], bytes]) -> None:
    scene.blobs.bend[scene.sha256(2, kind)] = bend
    await scene.refused(2, "ARTEFACT_UNTRUSTED")
    scene.blobs.bend.clear()


def neighbour(path: Path, tokenizer: Tokenizer, seed: int, precision: Precision = "int8", layers: int = 1) -> None:
    """Weights that differ a little from release 1's."""
    config = tiny_students.config_of(tokenizer, layers)
    weights = Student.random(config, seed=1, std=0.3).state_dict()
    arrays = {name: weights[name].float().numpy().copy() for name in config.tensor_shapes()}
    first = next(iter(arrays.values()))
    first[: max(1, len(first) // 50)] *= 1 + seed / 100
    write_variant(path, arrays, config, precision)


@pytest.mark.parametrize("bend", [flip, halve, endless])
async def test_a_delta_that_is_not_one_costs_bytes_and_nothing_else(
    scene: Scene, bend: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_students, "write_student", neighbour)
    for number in (3, 4):
        scene.world.publish(number)
    await scene.install(3)
    scene.blobs.known = frozenset(file.hashes["sha256"] for file in scene.student().targets.values())
    scene.blobs.every, scene.blobs.asked = bend, []
    await scene.install(4)
    deltas = set(scene.blobs.asked) - scene.blobs.known
    assert deltas, "no delta was tried"
    assert scene.sha256(4, "int8") in scene.blobs.asked
    await scene.answers(4)


@pytest.mark.parametrize("trickle", [False, True])
async def test_slow_retrieval(scene: Scene, trickle: bool) -> None:
    sha256, released = scene.sha256(2, "int8"), threading.Event()
    scene.blobs.slow[sha256] = (released, trickle)
    scene.agent.cloud.source._silence_s = 0.5
    scene.world.assign(scene.name, 2)
    await until(lambda: scene.blobs.asked.count(sha256) >= 2, LIMIT_S)  # it gave up, and tried again
    await scene.answers(1)
    released.set()
    await until(lambda: scene.serves(2), LIMIT_S)  # a server that recovers is no attacker


@pytest.mark.parametrize("trickle", [False, True])
async def test_the_cloud_hears_what_holds_a_transfer_up_while_the_old_release_serves(
    scene: Scene, trickle: bool
) -> None:
    sha256, released = scene.sha256(2, "int8"), threading.Event()
    scene.blobs.slow[sha256] = (released, trickle)
    scene.agent.cloud.source._silence_s = 0.5
    # The next try begins without a reason: it is late enough for this one to be read.
    scene.agent._look._backoff = Backoff(Pace(first_s=LIMIT_S, most_s=LIMIT_S))
    await scene.refused(2, "DEADLINE_EXCEEDED")
    said = scene.world.assignment(scene.name)
    assert said.installation["state"] == "INSTALLATION_STATE_FETCHING"  # held up, and not the release's fault
    assert said.serving_number == 1
    released.set()
    scene.world.assign(scene.name, 2)  # a hint: it need not wait for its next try
    await until(lambda: scene.world.assignment(scene.name).serving_number == 2, LIMIT_S)
    assert not scene.world.assignment(scene.name).installation.get("reason")
    await scene.answers(2)


BROKEN = {"empty": b"", "object": b"{}", "junk": b"\xff" * 100, "endless": b"x" * 6_000_000}


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "student"])
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
async def test_metadata_that_is_none(scene: Scene, role: str, content: bytes) -> None:
    scene.rewrite(role, content)
    await scene.refused(2, "ARTEFACT_UNTRUSTED")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "student"])
async def test_tampered_metadata(scene: Scene, role: str) -> None:
    metadata = Metadata[Any].from_bytes(scene.content(role))
    metadata.signed.expires += DAY
    if role == "targets":  # the device has this version: only a new one is read again
        metadata.signed.version += 1
        content = metadata.to_bytes()

        def work(session: Session) -> None:
            repository.store(session, role, metadata.signed.version, content, now=now())
            repository.sign_online(session, scene.signers["online"], now())

        scene.act(work)
    else:
        scene.rewrite(role, metadata.to_bytes())
    await scene.refused(2, "ARTEFACT_UNTRUSTED")


async def test_rollback_to_an_older_timestamp(scene: Scene) -> None:
    old = scene.content("timestamp")
    scene.world.publish(3)
    await scene.install(3)
    scene.world.publish(4)
    scene.rewrite("timestamp", old)
    await scene.refused(4, "ARTEFACT_UNTRUSTED", still=3)


async def test_rollback_to_an_older_list_with_the_online_key(scene: Scene) -> None:
    await scene.install(2)
    scene.world.publish(3)

    def work(session: Session) -> None:
        row = repository.required(session, "student")
        older = repository.read_metadata(session, f"{row.version - 2}.student.json")
        snapshot = Metadata[Snapshot].from_bytes(repository.required(session, "snapshot").content).signed
        snapshot.version += 1
        snapshot.meta["student.json"] = MetaFile.from_data(row.version - 2, older, ["sha256"])
        content = repository.signed(snapshot, scene.signers["online"])
        repository.store(session, "snapshot", snapshot.version, content, now=now())
        repository.sign_timestamp(session, scene.signers["online"], now())

    scene.act(work)
    await scene.refused(3, "ARTEFACT_UNTRUSTED", still=2)


async def test_freeze(scene: Scene) -> None:
    """The cloud goes on showing what it once signed, until that expires."""
    scene.act(lambda session: repository.sign_timestamp(session, scene.signers["online"], now() - 2 * DAY))
    await scene.refused(2, "METADATA_EXPIRED")


async def test_mix_and_match(scene: Scene) -> None:
    """A list and a snapshot, each genuine, that never belonged together."""
    older = scene.act(lambda session: repository.read_metadata(session, "1.student.json"))
    scene.rewrite("student", older)
    await scene.refused(2, "ARTEFACT_UNTRUSTED")


def evil_list(scene: Scene) -> Targets:
    """The published list, but for the weights of release 2, which are the attacker's."""
    student = scene.student()
    evil = scene.blobs.put([b"evil weights"])
    path = path_of("faq", 2, "int8")
    custom = {"custom": roles.custom("faq", 2, "int8")}
    student.targets[path] = TargetFile(evil.size_bytes, {"sha256": evil.sha256}, path, custom)
    return student


@pytest.mark.parametrize(
    "stolen",
    [
        (),
        ("online",),
        ("distiller",),
        ("gate",),
        ("distiller", "online"),
        ("gate", "online"),
        ("distiller", "feedback"),
        ("gate", "root-1"),
        ("distiller", "targets"),
    ],
    ids="+".join,
)
async def test_stolen_keys_beside_the_online_one(scene: Scene, stolen: tuple[str, ...]) -> None:
    scene.forge(evil_list(scene), *stolen)
    await scene.refused(2, "ARTEFACT_UNTRUSTED")


async def test_one_stolen_signature_under_two_names(scene: Scene) -> None:
    student = evil_list(scene)
    scene.forge(student, "distiller")
    metadata = Metadata[Targets].from_bytes(scene.content("student"))
    signature = next(iter(metadata.signatures.values()))
    other = scene.signers["gate"].public_key.keyid
    metadata.signatures[other] = type(signature)(other, signature.signature)
    scene.rewrite("student", metadata.to_bytes())
    scene.act(lambda session: repository.sign_online(session, scene.signers["online"], now()))
    await scene.refused(2, "ARTEFACT_UNTRUSTED")


async def test_an_attackers_own_keys(scene: Scene) -> None:
    for name in ("distiller", "gate", "online"):
        scene.signers[name] = CryptoSigner.generate_ed25519()
    scene.forge(evil_list(scene), "distiller", "gate")
    await scene.refused(2, "ARTEFACT_UNTRUSTED")


@pytest.mark.parametrize("stolen", [("root-1",), ("root-1", "targets", "online", "distiller", "gate")], ids="+".join)
async def test_a_root_that_one_holder_has_signed(scene: Scene, stolen: tuple[str, ...]) -> None:
    root = Metadata[Root].from_bytes(scene.content("root")).signed
    attacker = CryptoSigner.generate_ed25519()
    for role in ("root", "targets", "snapshot", "timestamp"):
        root.roles[role].keyids.clear()
        root.add_key(attacker.public_key, role)
    root.roles["root"].threshold = 1
    root.version += 1
    content = repository.signed(root, attacker, *(scene.signers[name] for name in stolen))
    scene.act(lambda session: repository.store(session, "root", root.version, content, now=now()))
    await scene.refused(2, "ARTEFACT_UNTRUSTED")


async def test_fast_forward_with_a_stolen_online_key_is_healed_by_a_new_one(scene: Scene) -> None:
    timestamp = Metadata[Timestamp].from_bytes(scene.content("timestamp")).signed
    genuine = scene.content("timestamp")
    timestamp.version = 2**31
    scene.rewrite("timestamp", repository.signed(timestamp, scene.signers["online"]))
    await scene.install(2)  # genuine, though its timestamp is not
    scene.rewrite("timestamp", genuine)
    scene.world.publish(3)
    await scene.refused(3, "ARTEFACT_UNTRUSTED", still=2)
    scene.replace_online_key()
    scene.world.publish(4)
    await scene.install(4)


async def test_a_stolen_online_key_is_shut_out_by_a_new_root(scene: Scene) -> None:
    thief = scene.signers["online"]
    scene.replace_online_key()
    await scene.install(2)
    scene.world.publish(3)
    scene.signers["online"] = thief
    scene.forge(scene.student(), "distiller", "gate")
    await scene.refused(3, "ARTEFACT_UNTRUSTED", still=2)


@pytest.mark.parametrize("stolen", [None, "distiller", "gate"])
async def test_a_revoked_release_that_is_offered_again(scene: Scene, stolen: str | None) -> None:
    def revoke(session: Session) -> None:
        withdraw.revoke(session, "faq", 2, "it insults people", now())
        proposal = publish.propose(session, scene.signers["distiller"])
        assert proposal
        publish.approve(session, scene.signers["gate"], proposal)
        assert publish.publish(session, scene.signers["online"])

    listed = dict(scene.student().targets)
    scene.act(revoke)

    def offer(session: Session) -> None:  # the control plane itself would never name it again
        session.get_one(Release, ("faq", 2)).state = ReleaseState.PUBLISHED

    scene.act(offer)
    if stolen:
        student = scene.student()
        student.targets = listed
        scene.forge(student, stolen)
    await scene.refused(2, "ARTEFACT_UNTRUSTED")


async def test_a_release_below_the_lowest(scene: Scene) -> None:
    await scene.install(2)

    def work(session: Session) -> None:
        withdraw.raise_min_release(session, "faq", 2, now())
        proposal = publish.propose(session, scene.signers["distiller"])
        assert proposal
        publish.approve(session, scene.signers["gate"], proposal)
        assert publish.publish(session, scene.signers["online"])

    scene.act(work)
    await scene.refused(1, "RELEASE_TOO_OLD", still=2)


async def test_new_student_keys_stop_installing_until_both_have_signed_and_no_longer(scene: Scene) -> None:
    await scene.install(2)
    scene.world.publish(3)
    for name in ("distiller", "gate"):
        old, new = scene.signers[name], CryptoSigner.generate_ed25519()
        scene.signers[name] = scene.world.signers[name] = new
        scene.hold("targets", Changes(replace=[(old.public_key.keyid, new.public_key)]), "targets")
    await scene.refused(3, "ARTEFACT_UNTRUSTED", still=2)

    def renew(session: Session) -> None:
        proposal = publish.propose(session, scene.signers["distiller"])
        assert proposal
        publish.approve(session, scene.signers["gate"], proposal)
        assert publish.publish(session, scene.signers["online"])

    scene.act(renew)
    scene.world.publish(4)
    await scene.install(4)


async def test_a_device_that_was_away_for_forty_roots_comes_back(tmp_path: Path) -> None:
    world = CloudWorld(tmp_path)
    async with world.running():
        settings = world.device()
        name = await enrolled(world, settings)
        world.student()
        world.publish(1)
        async with alive(settings) as agent:
            scene = Scene(world, agent, name)
            await scene.install(1)
        for turn in range(40):
            key = keys.ROOTS[turn % 3]
            old, new = scene.signers[key], CryptoSigner.generate_ed25519()
            scene.signers["old"], scene.signers[key] = old, new
            changes = Changes(replace=[(old.public_key.keyid, new.public_key)])
            scene.hold("root", changes, "old", key, keys.ROOTS[(turn + 1) % 3])
        assert Metadata[Root].from_bytes(scene.content("root")).signed.version == 41
        world.publish(2)
        async with alive(settings) as agent:
            scene.agent = agent
            await scene.install(2)
            # and whoever holds all the keys of before is nobody now
            first = keys.load(world.settings.paths.keys, "root-1")
            evil = Metadata[Root].from_bytes(scene.content("root")).signed
            evil.version += 1
            content = repository.signed(evil, first, keys.load(world.settings.paths.keys, "root-2"))
            world.publish(3)
            scene.act(lambda session: repository.store(session, "root", evil.version, content, now=now()))
            await scene.refused(3, "ARTEFACT_UNTRUSTED", still=2)
