"""From a packed release to published metadata, on every database."""

import datetime as dt
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from securesystemslib.signer import CryptoSigner
from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, Snapshot, TargetFile, Targets, Timestamp

from ebbflow.cloud.registry import changes
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Distillation,
    DistillationState,
    Release,
    ReleaseState,
    Student,
    TrustMetadata,
)
from ebbflow.cloud.release import keys, publish, repository, rules
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles
from ebbflow.common.trust.targets import parse_path, path_of

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.create(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def signers(folder: Path, registry: Registry) -> dict[str, CryptoSigner]:
    with registry.transaction() as session:
        repository.initialise(session, folder, NOW)
    return {name: keys.load(folder, name) for name in keys.NAMES}


def pack(registry: Registry, number: int, student_id: str = "faq") -> None:
    files = {}
    for kind in roles.KINDS:
        path = path_of(student_id, number, kind)
        files[path] = {"sha256": hashlib.sha256(path.encode()).hexdigest(), "size_bytes": 100 + number, "kind": kind}
    with registry.transaction() as session:
        if session.get(Student, student_id) is None:
            session.add(
                Student(
                    id=student_id,
                    teacher="",
                    architecture={},
                    corpus_sha256="0" * 64,
                    topics=[],
                    privacy_policy={},
                    selector="",
                    create_time=NOW,
                )
            )
            session.flush()
        session.add(
            Distillation(
                id=f"{student_id}-{number}",
                student_id=student_id,
                state=DistillationState.SUCCEEDED,
                recipe={},
                mixture={},
                base_release=None,
                round_id=None,
                create_time=NOW,
                update_time=NOW,
            )
        )
        session.flush()
        session.add(
            Release(
                student_id=student_id,
                number=number,
                distillation_id=f"{student_id}-{number}",
                state=ReleaseState.PACKED,
                targets=files,
                create_time=NOW + number * dt.timedelta(seconds=1),
            )
        )


def state(registry: Registry, number: int) -> ReleaseState:
    with registry.reading() as session:
        return session.get_one(Release, ("faq", number)).state


def student(registry: Registry) -> Targets:
    with registry.reading() as session:
        return repository.verified_student(session)


def go_round(registry: Registry, signers: dict[str, CryptoSigner], now: dt.datetime = NOW) -> None:
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], now)
    assert proposal
    with registry.transaction() as session:
        publish.approve(session, signers["gate"], proposal, now=now)
    with registry.transaction() as session:
        assert publish.publish(session, signers["online"], now)


def alter(registry: Registry, change: Callable[[Targets], None], *signers: CryptoSigner) -> None:
    """Replaces the open proposal, as somebody would who writes to the registry and has these keys."""
    with registry.transaction() as session:
        row = repository.newest(session, roles.STUDENT, published=False)
        assert row
        metadata = Metadata[Targets].from_bytes(row.content)
        change(metadata.signed)
        row.content = repository.signed(metadata.signed, *signers)


def test_a_packed_release_is_proposed_approved_and_published(
    registry: Registry, signers: dict[str, CryptoSigner]
) -> None:
    pack(registry, 1)
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], NOW)
    assert proposal
    assert (proposal.change.student_id, proposal.change.number, proposal.version) == ("faq", 1, 2)
    assert set(proposal.change.files) == set(roles.KINDS)
    assert state(registry, 1) is ReleaseState.PROPOSED
    with registry.reading() as session:
        assert publish.open_proposal(session, NOW) == proposal
    assert student(registry).targets == {}
    with registry.transaction() as session:
        publish.approve(session, signers["gate"], proposal, {"probeLoss": [1.0]}, NOW)
    with registry.reading() as session:
        assert publish.open_proposal(session, NOW) is None
        before = changes.revisions(session)
    with registry.transaction() as session:
        assert publish.publish(session, signers["online"], NOW)
    with registry.reading() as session:
        assert changes.revisions(session).get("desired_state", 0) == before.get("desired_state", 0) + 1
        assert session.get_one(Release, ("faq", 1)).card == {"probeLoss": [1.0]}
    assert state(registry, 1) is ReleaseState.PUBLISHED
    published = student(registry)
    assert published.unrecognized_fields == {"min_release": {"faq": 1}, "highest": {"faq": 1}}
    file = published.targets["student/faq/1.int8.safetensors"]
    assert file.custom == {"student": "faq", "release": 1, "kind": "int8"}


def test_releases_go_one_by_one_and_min_release_stays_at_the_first(
    registry: Registry, signers: dict[str, CryptoSigner]
) -> None:
    for number in (1, 2):
        pack(registry, number)
    go_round(registry, signers)
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], NOW)
        assert proposal
        assert proposal.change.number == 2
        assert publish.propose(session, signers["distiller"], NOW) is None
    with registry.transaction() as session:
        publish.approve(session, signers["gate"], proposal, now=NOW)
        publish.publish(session, signers["online"], NOW)
    assert rules.min_releases(student(registry)) == {"faq": 1}
    assert {parse_path(path).number for path in student(registry).targets} == {1, 2}


def test_every_served_file_hangs_together(registry: Registry, signers: dict[str, CryptoSigner]) -> None:
    pack(registry, 1)
    go_round(registry, signers)
    with registry.reading() as session:
        timestamp = Metadata[Timestamp].from_bytes(repository.read_metadata(session, "timestamp.json")).signed
        content = repository.read_metadata(session, f"{timestamp.snapshot_meta.version}.snapshot.json")
        timestamp.snapshot_meta.verify_length_and_hashes(content)
        snapshot = Metadata[Snapshot].from_bytes(content).signed
        for role in ("targets", "student"):
            meta = snapshot.meta[f"{role}.json"]
            meta.verify_length_and_hashes(repository.read_metadata(session, f"{meta.version}.{role}.json"))
        assert repository.trust_root(session) == repository.read_metadata(session, "1.root.json")
        assert session.scalar(sa.select(sa.func.count()).where(TrustMetadata.role == "timestamp")) == 1


@pytest.mark.parametrize(
    "file_name",
    [
        "2.root.json",
        "root.json",
        "2.timestamp.json",
        "2.student.json",
        "../keys/gate.pem",
        "1.feedback.json",
        "",
    ],
)
def test_no_other_file_is_served(registry: Registry, signers: dict[str, CryptoSigner], file_name: str) -> None:
    pack(registry, 1)
    with registry.transaction() as session:
        publish.propose(session, signers["distiller"], NOW)
    with registry.reading() as session, pytest.raises(EbbflowError) as caught:
        repository.read_metadata(session, file_name)
    assert caught.value.reason is Reason.METADATA_NOT_FOUND


def test_the_first_set_up_is_made_once(registry: Registry, folder: Path, signers: dict[str, CryptoSigner]) -> None:
    with registry.reading() as session:
        before = repository.read_metadata(session, "timestamp.json")
    with registry.transaction() as session:
        repository.initialise(session, folder, NOW + DAY)
    with registry.reading() as session:
        assert repository.read_metadata(session, "timestamp.json") == before


def change_nothing(_targets: Targets) -> None:
    pass


def swap_published_weights(targets: Targets) -> None:
    targets.targets["student/faq/1.int8.safetensors"].hashes["sha256"] = "e" * 64


def drop_a_published_file(targets: Targets) -> None:
    del targets.targets["student/faq/1.int8.safetensors"]


def add_a_third_release(targets: Targets) -> None:
    path = "student/faq/3.int8.safetensors"
    custom = roles.custom("faq", 3, "int8")
    targets.targets[path] = TargetFile(1, {"sha256": "e" * 64}, path, {"custom": custom})


def add_to_a_published_release(targets: Targets) -> None:
    for path in [path for path in targets.targets if "/2." in path]:
        del targets.targets[path]
    del targets.targets["student/faq/1.int4.safetensors"]


def add_a_file_outside(targets: Targets) -> None:
    targets.targets["agent/wheel.whl"] = TargetFile(1, {"sha256": "e" * 64}, "agent/wheel.whl")


def mislabel(targets: Targets) -> None:
    targets.targets["student/faq/2.int8.safetensors"].unrecognized_fields["custom"]["release"] = 1


def use_another_hash(targets: Targets) -> None:
    targets.targets["student/faq/2.int8.safetensors"].hashes = {"md5": "e" * 32}


def leave_the_manifest_out(targets: Targets) -> None:
    del targets.targets["student/faq/2.manifest.json"]


def lower_min_release(targets: Targets) -> None:
    targets.unrecognized_fields["min_release"]["faq"] = 0


def raise_min_release(targets: Targets) -> None:
    targets.unrecognized_fields["min_release"]["faq"] = 2


def invent_a_min_release(targets: Targets) -> None:
    targets.unrecognized_fields["min_release"]["other"] = 9


def add_a_field(targets: Targets) -> None:
    targets.unrecognized_fields["note"] = "hello"


def live_for_ever(targets: Targets) -> None:
    targets.expires = NOW + 4000 * DAY


ABUSES = [
    swap_published_weights,
    drop_a_published_file,
    add_a_third_release,
    add_to_a_published_release,
    add_a_file_outside,
    mislabel,
    use_another_hash,
    leave_the_manifest_out,
    lower_min_release,
    raise_min_release,
    invent_a_min_release,
    add_a_field,
    live_for_ever,
]


@pytest.mark.parametrize("abuse", ABUSES)
def test_the_gate_refuses_whatever_changes_more_than_one_new_release(
    registry: Registry, signers: dict[str, CryptoSigner], abuse: Callable[[Targets], None]
) -> None:
    for number in (1, 2):
        pack(registry, number)
    go_round(registry, signers)
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], NOW)
    assert proposal
    alter(registry, abuse, signers["distiller"])  # a stolen distiller key
    with registry.reading() as session, pytest.raises(EbbflowError) as caught:
        publish.open_proposal(session, NOW)
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED
    with registry.transaction() as session, pytest.raises(EbbflowError) as caught:
        publish.approve(session, signers["gate"], proposal, now=NOW)
    assert caught.value.reason is Reason.METADATA_STALE
    with registry.transaction() as session:
        assert not publish.publish(session, signers["online"], NOW)
        publish.reject(session, str(caught.value))
    assert state(registry, 2) is ReleaseState.REJECTED
    assert student(registry).version == 2


def test_a_proposal_that_was_replaced_is_not_signed_by_mistake(
    registry: Registry, signers: dict[str, CryptoSigner]
) -> None:
    pack(registry, 1)
    with registry.transaction() as session:
        seen = publish.propose(session, signers["distiller"], NOW)
    assert seen

    def other_weights(targets: Targets) -> None:
        targets.targets["student/faq/1.int8.safetensors"].hashes["sha256"] = "e" * 64

    alter(registry, other_weights, signers["distiller"])
    with pytest.raises(EbbflowError) as caught, registry.transaction() as session:
        publish.approve(session, signers["gate"], seen, now=NOW)
    assert caught.value.reason is Reason.METADATA_STALE
    with pytest.raises(EbbflowError) as caught, registry.transaction() as session:
        publish.reject(session, "no", seen)
    assert caught.value.reason is Reason.METADATA_STALE


def test_one_signature_publishes_nothing(registry: Registry, signers: dict[str, CryptoSigner]) -> None:
    pack(registry, 1)
    with registry.transaction() as session:
        publish.propose(session, signers["distiller"], NOW)
    for names in (
        (),
        ("distiller",),
        ("gate",),
        ("distiller", "online"),
        ("distiller", "targets"),
        ("online", "root-1"),
    ):
        alter(registry, change_nothing, *(signers[name] for name in names))
        with registry.transaction() as session:
            assert not publish.publish(session, signers["online"], NOW)
    assert student(registry).version == 1


@pytest.mark.parametrize(("proposer", "approver"), [("gate", "gate"), ("distiller", "distiller"), ("online", "gate")])
def test_only_the_two_right_keys_approve(
    registry: Registry, signers: dict[str, CryptoSigner], proposer: str, approver: str
) -> None:
    pack(registry, 1)
    with registry.transaction() as session:
        proposal = publish.propose(session, signers[proposer], NOW)
    assert proposal
    with pytest.raises(EbbflowError) as caught, registry.transaction() as session:
        publish.approve(session, signers[approver], proposal, now=NOW)
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED


def test_a_rejected_release_says_why_and_makes_way(registry: Registry, signers: dict[str, CryptoSigner]) -> None:
    for number in (1, 2):
        pack(registry, number)
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], NOW)
    with registry.transaction() as session:
        publish.reject(session, "int4 loses too much", proposal, {"probeLoss": [9.0]})
    with registry.reading() as session:
        release = session.get_one(Release, ("faq", 1))
        assert (release.state, release.reason) == (ReleaseState.REJECTED, "int4 loses too much")
        assert release.card == {"probeLoss": [9.0]}
    with registry.transaction() as session:
        publish.reject(session, "nothing is open")
    go_round(registry, signers)
    assert rules.min_releases(student(registry)) == {"faq": 2}


def test_a_stale_proposal_is_withdrawn_and_made_again(registry: Registry, signers: dict[str, CryptoSigner]) -> None:
    for number in (1, 2):
        pack(registry, number)
    with registry.transaction() as session:
        publish.propose(session, signers["distiller"], NOW)
    with registry.transaction() as session:  # another repository state won, for example after a restored backup
        base = repository.verified_student(session)
        row = repository.newest(session, roles.STUDENT, published=False)
        assert row
        session.delete(row)
        session.flush()
        base.version, base.expires = 2, NOW + 14 * DAY
        both = (signers["distiller"], signers["gate"])
        repository.store(session, roles.STUDENT, 2, repository.signed(base, *both), now=NOW)
        stale = repository.signed(base, signers["distiller"])
        repository.store(session, roles.STUDENT, 4, stale, now=NOW, published=False)
    with registry.reading() as session, pytest.raises(EbbflowError) as caught:
        publish.open_proposal(session, NOW)
    assert caught.value.reason is Reason.METADATA_STALE
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], NOW)
    assert proposal
    assert (proposal.version, proposal.change.number) == (3, 1)


def test_a_proposal_that_waited_too_long_is_made_again(registry: Registry, signers: dict[str, CryptoSigner]) -> None:
    pack(registry, 1)
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], NOW)
        assert proposal
        publish.approve(session, signers["gate"], proposal, now=NOW)
    later = NOW + 15 * DAY
    with registry.transaction() as session:
        assert not publish.publish(session, signers["online"], later)
    go_round(registry, signers, later)
    assert state(registry, 1) is ReleaseState.PUBLISHED


def test_a_release_with_broken_files_is_turned_down_and_does_not_block(
    registry: Registry, signers: dict[str, CryptoSigner]
) -> None:
    for number in (1, 2):
        pack(registry, number)
    with registry.transaction() as session:
        release = session.get_one(Release, ("faq", 1))
        release.targets = {path: file for path, file in release.targets.items() if file["kind"] != "tokenizer"}
    with registry.transaction() as session:
        assert publish.propose(session, signers["distiller"], NOW) is None
    assert state(registry, 1) is ReleaseState.REJECTED
    go_round(registry, signers)
    assert state(registry, 2) is ReleaseState.PUBLISHED


def test_the_list_of_releases_is_renewed_at_half_life(registry: Registry, signers: dict[str, CryptoSigner]) -> None:
    pack(registry, 1)
    go_round(registry, signers)
    with registry.transaction() as session:
        assert publish.propose(session, signers["distiller"], NOW + 6 * DAY) is None
    later = NOW + 7 * DAY
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], later)
    assert proposal
    assert (proposal.change.student_id, proposal.change.files) == (None, {})
    with registry.transaction() as session:
        publish.approve(session, signers["gate"], proposal, now=later)
        assert publish.publish(session, signers["online"], later)
    renewed = student(registry)
    assert renewed.expires == later + 14 * DAY
    assert len(renewed.targets) == len(roles.KINDS)
    assert state(registry, 1) is ReleaseState.PUBLISHED


@pytest.mark.parametrize(
    ("after", "timestamp_version", "snapshot_version"),
    [(0.4 * DAY, 1, 1), (0.5 * DAY, 2, 1), (3.4 * DAY, 2, 1), (3.5 * DAY, 2, 2)],
)
def test_online_roles_are_signed_anew_at_half_life(
    registry: Registry,
    signers: dict[str, CryptoSigner],
    after: dt.timedelta,
    timestamp_version: int,
    snapshot_version: int,
) -> None:
    with registry.transaction() as session:
        signed = publish.refresh_online(session, signers["online"], NOW + after)
        assert signed == (timestamp_version > 1)
        assert not publish.refresh_online(session, signers["online"], NOW + after)
    with registry.reading() as session:
        timestamp = Metadata[Timestamp].from_bytes(repository.read_metadata(session, "timestamp.json")).signed
    assert (timestamp.version, timestamp.snapshot_meta.version) == (timestamp_version, snapshot_version)


def test_replicas_that_tick_at_once_publish_once(registry: Registry, signers: dict[str, CryptoSigner]) -> None:
    pack(registry, 1)
    with registry.transaction() as session:
        proposal = publish.propose(session, signers["distiller"], NOW)
        assert proposal
        publish.approve(session, signers["gate"], proposal, now=NOW)

    def tick(step: Callable[[Session, CryptoSigner, dt.datetime], bool], now: dt.datetime) -> bool:
        with registry.transaction() as session:
            return step(session, signers["online"], now)

    for step, now in ((publish.publish, NOW), (publish.refresh_online, NOW + 4 * DAY)):
        with ThreadPoolExecutor(8) as pool:
            done = list(pool.map(lambda _, step=step, now=now: tick(step, now), range(8)))
        assert sum(done) == 1
    with registry.reading() as session:
        timestamp = Metadata[Timestamp].from_bytes(repository.read_metadata(session, "timestamp.json")).signed
    assert (timestamp.version, timestamp.snapshot_meta.version) == (3, 3)


def test_distillers_that_propose_at_once_open_one_proposal(
    registry: Registry, signers: dict[str, CryptoSigner]
) -> None:
    for number in (1, 2, 3):
        pack(registry, number)

    def tick(_: int) -> bool:
        with registry.transaction() as session:
            return publish.propose(session, signers["distiller"], NOW) is not None

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(tick, range(6))) == 1


def test_altered_published_metadata_stops_everybody(registry: Registry, signers: dict[str, CryptoSigner]) -> None:
    pack(registry, 1)
    with registry.transaction() as session:
        row = repository.newest(session, roles.STUDENT)
        assert row
        metadata = Metadata[Targets].from_bytes(row.content)
        metadata.signed.unrecognized_fields["min_release"]["faq"] = 0
        row.content = metadata.to_bytes()
    with pytest.raises(EbbflowError) as caught, registry.transaction() as session:
        publish.propose(session, signers["distiller"], NOW)
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED


def test_without_a_repository_the_error_says_so(registry: Registry) -> None:
    with registry.reading() as session, pytest.raises(EbbflowError) as caught:
        publish.refresh_online(session, CryptoSigner.generate_ed25519(), NOW)
    assert caught.value.reason is Reason.NOT_INITIALISED
