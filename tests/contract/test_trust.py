"""Ceremonies against a running control plane, and what distiller, gate and devices make of them."""

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Metadata, Root, Targets

from ebbflow.api.v1 import trust_pb2 as pb
from ebbflow.api.v1.trust_pb2_grpc import TrustServiceStub
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import AuditEntry, ReleaseState, TrustMetadata
from ebbflow.cloud.release import keys, publish, repository, rules
from ebbflow.cloud.release import standing as standings
from ebbflow.cloud.release.anchor import Anchor
from ebbflow.cloud.services.trust import own_keys
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import ceremony, roles
from ebbflow.common.trust.ceremony import Changes

Plane = Any


class Ceremony:
    """The keys of a plane, and people who sign with them."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.signers: dict[str, Signer] = {
            name: keys.load(plane.cloud.settings.paths.keys, name) for name in keys.NAMES
        }

    def new(self, name: str) -> str:
        """Puts a fresh key in the place of one; returns the id of the old one."""
        old: str = self.signers[name].public_key.keyid
        self.signers[name] = CryptoSigner.generate_ed25519()
        return old

    def published(self, role: str) -> Metadata[Any]:
        with self.plane.registry.reading() as session:
            return ceremony.read(repository.required(session, role).content, role)

    def stage(self, role: str, changes: Changes, *names: str) -> bytes:
        staged = ceremony.read(ceremony.stage(self.published(role), changes, now()), role)
        for name in names:
            ceremony.add_signature(staged, self.signers[name])
        return staged.to_bytes()

    def replace(self, role: str, name: str, *names: str) -> bytes:
        """A version that puts a fresh key in the place of one."""
        old = self.signers[name]
        self.new(name)
        by = {**self.signers, f"old {name}": old}
        staged = ceremony.read(
            ceremony.stage(
                self.published(role), Changes(replace=[(old.public_key.keyid, self.signers[name].public_key)]), now()
            ),
            role,
        )
        for signer in names:
            ceremony.add_signature(staged, by[signer])
        return staged.to_bytes()


@pytest.fixture
def table(plane: Plane) -> Ceremony:
    return Ceremony(plane)


async def send(plane: Plane, content: bytes) -> pb.TrustRole:
    answer = await TrustServiceStub(plane.admin().channel).PublishMetadata(pb.PublishMetadataRequest(metadata=content))
    role: pb.TrustRole = answer.role
    return role


async def refusal(plane: Plane, content: bytes) -> str:
    with pytest.raises(EbbflowError) as caught:
        await send(plane, content)
    assert caught.value.reason is Reason.METADATA_REFUSED
    return str(caught.value)


async def standing(plane: Plane) -> dict[str, pb.TrustRole]:
    answer = await TrustServiceStub(plane.admin("viewer").channel).GetTrust(pb.GetTrustRequest())
    return {role.role: role for role in answer.roles}


async def test_a_healthy_cloud_asks_for_nothing(plane: Plane) -> None:
    found = await standing(plane)
    assert list(found) == ["root", "targets", "student", "feedback", "snapshot", "timestamp"]
    assert [role.action for role in found.values()] == [""] * 6
    assert (found["root"].threshold, len(found["root"].keys)) == (2, 3)
    assert all(key.signed for name, role in found.items() if name != "feedback" for key in role.keys)
    assert found["feedback"].version == 0


@pytest.mark.parametrize(
    ("days", "warned", "word"),
    [
        (260, [], ""),
        (271, ["targets"], "expires in 58 days"),
        (310, ["root", "targets"], "publish a new version before"),
    ],
)
async def test_offline_signatures_are_asked_for_sixty_days_ahead(
    plane: Plane, days: int, warned: list[str], word: str
) -> None:
    when = now() + dt.timedelta(days=days)
    own = own_keys(plane.cloud)
    with plane.registry.reading() as session:
        found = {role.role: role.action for role in standings.standing(session, own, when)}
    assert [name for name in ("root", "targets") if found[name]] == warned
    assert all("ebbflow trust stage" in found[name] for name in warned)
    assert word in "".join(found[name] for name in warned)
    with plane.registry.reading() as session:
        late = {role.role: role.action for role in standings.standing(session, own, now() + dt.timedelta(days=400))}
    assert "expired on" in late["root"]
    assert "cloud gate" in late["student"]
    assert "cloud serve" in late["timestamp"]


async def test_a_root_is_published_once_and_everything_signed_over_it(plane: Plane, table: Ceremony) -> None:
    content = table.stage("root", Changes(), "root-1", "root-2")
    for _ in range(2):
        role = await send(plane, content)
        assert (role.role, role.version, [key.signed for key in role.keys].count(True)) == ("root", 2, 2)
    with plane.registry.reading() as session:
        assert repository.read_metadata(session, "2.root.json") == content
        assert repository.required(session, "snapshot").version == 2
        entries = [entry.resource for entry in session.query(AuditEntry)]
    assert entries.count("trust/root/2") == 2


async def test_what_a_device_would_refuse_the_cloud_refuses(plane: Plane, table: Ceremony) -> None:
    assert "no metadata" in await refusal(plane, b"nonsense")
    assert "longer than" in await refusal(plane, b"x" * 600_000)
    assert "asks for 1 more" in await refusal(plane, table.stage("root", Changes(), "root-1"))
    assert "asks for 2 more" in await refusal(plane, table.stage("root", Changes(), "online", "gate"))
    skipped = Metadata[Root].from_bytes(table.stage("root", Changes()))
    skipped.signed.version = 3
    for name in keys.ROOTS:
        ceremony.add_signature(skipped, table.signers[name])
    assert "1 is published" in await refusal(plane, skipped.to_bytes())
    assert "asks for 1 more" in await refusal(plane, table.stage("targets", Changes(), "root-1", "distiller"))
    with plane.registry.reading() as session:
        student = repository.required(session, "student").content
    assert await refusal(plane, student)
    assert (await standing(plane))["root"].version == 1


async def test_a_second_root_of_the_same_version_is_refused(plane: Plane, table: Ceremony) -> None:
    first = table.stage("root", Changes(), "root-1", "root-2")
    other = table.stage("root", Changes(threshold=3), *keys.ROOTS)
    await send(plane, first)
    assert "stage it anew" in await refusal(plane, other)


async def test_only_owners_publish(plane: Plane, table: Ceremony) -> None:
    content = table.stage("root", Changes(), "root-1", "root-2")
    for role in ("viewer", "operator"):
        stub = TrustServiceStub(plane.admin(role).channel)
        with pytest.raises(EbbflowError) as caught:
            await stub.PublishMetadata(pb.PublishMetadataRequest(metadata=content))
        assert caught.value.reason is Reason.ROLE_INSUFFICIENT


async def test_a_replaced_root_key_cannot_sign_the_next_root(plane: Plane, table: Ceremony) -> None:
    thief = table.signers["root-1"]
    await send(plane, table.replace("root", "root-1", "old root-1", "root-1", "root-2"))
    table.signers["thief"] = thief
    assert "asks for 1 more" in await refusal(plane, table.stage("root", Changes(), "thief", "root-2"))
    await send(plane, table.stage("root", Changes(), "root-1", "root-2"))


async def test_a_replaced_targets_key_asks_for_new_targets(plane: Plane, table: Ceremony) -> None:
    await send(plane, table.replace("root", "targets", "root-1", "root-2"))
    assert "trust stage targets" in (await standing(plane))["targets"].action
    await send(plane, table.stage("targets", Changes(), "targets"))
    assert (await standing(plane))["targets"].action == ""


async def test_a_replaced_online_key_asks_for_a_restart_and_then_signs(plane: Plane, table: Ceremony) -> None:
    await send(plane, table.replace("root", "online", "root-1", "root-3"))
    found = await standing(plane)
    assert "online_key" in found["snapshot"].action
    assert "online_key" in found["timestamp"].action
    with plane.registry.transaction() as session, pytest.raises(EbbflowError) as caught:
        publish.refresh_online(session, plane.cloud.online_signer)
    assert caught.value.reason is Reason.KEY_UNUSABLE
    plane.cloud.online_signer = table.signers["online"]
    with plane.registry.transaction() as session:
        assert publish.refresh_online(session, plane.cloud.online_signer)
        assert not publish.refresh_online(session, plane.cloud.online_signer)
    assert [role.action for role in (await standing(plane)).values()] == [""] * 6


async def test_an_online_key_can_be_replaced_without_a_gap(plane: Plane, table: Ceremony) -> None:
    old = table.signers["online"]
    new = CryptoSigner.generate_ed25519()
    await send(plane, table.stage("root", Changes(add=[("online", new.public_key)]), "root-1", "root-2"))
    assert [role.action for role in (await standing(plane)).values()] == [""] * 6
    plane.cloud.online_signer = new
    revoked = Changes(revoke=[("online", old.public_key.keyid)])
    await send(plane, table.stage("root", revoked, "root-1", "root-2"))
    assert [role.action for role in (await standing(plane)).values()] == [""] * 6


async def test_a_replaced_feedback_key_asks_for_a_restart(plane: Plane, table: Ceremony) -> None:
    await send(plane, table.replace("targets", "feedback", "targets"))
    assert "feedback_key" in (await standing(plane))["feedback"].action
    plane.cloud.plan_signer = PlanSigner(table.signers["feedback"])
    assert (await standing(plane))["feedback"].action == ""


def pinned(plane: Plane, folder: Path) -> Path:
    with plane.registry.reading() as session:
        folder.mkdir(exist_ok=True)
        (folder / "root.json").write_bytes(repository.read_metadata(session, "1.root.json"))
    return folder / "root.json"


def publish_release(plane: Plane, table: Ceremony, number: int) -> None:
    plane.release(number, state=ReleaseState.PACKED, content=b"weights %d" % number)
    go_round(plane, table)


def go_round(plane: Plane, table: Ceremony, *anchors: Anchor) -> rules.Change | None:
    """Distiller and gate do what is theirs, each with its own view of what is genuine; the server publishes."""
    distiller, gate = anchors or (None, None)
    with plane.registry.transaction() as session:
        trust = distiller.trusted if distiller else repository.trusted
        publish.propose(session, table.signers["distiller"], trust=trust)
    trust = gate.trusted if gate else repository.trusted
    with plane.registry.transaction() as session:
        proposal = publish.open_proposal(session, trust=trust)
        if proposal is None:
            return None
        publish.approve(session, table.signers["gate"], proposal, trust=trust)
    with plane.registry.transaction() as session:
        assert publish.publish(session, plane.cloud.online_signer)
    return proposal.change


@pytest.mark.parametrize("replaced", [("gate",), ("distiller",), ("distiller", "gate")])
@pytest.mark.parametrize("open_before", [False, True])
@pytest.mark.parametrize("fresh_machine", [False, True])
async def test_new_keys_of_distiller_and_gate_sign_the_list_anew_by_themselves(
    plane: Plane, table: Ceremony, tmp_path: Path, replaced: tuple[str, ...], open_before: bool, fresh_machine: bool
) -> None:
    pin = pinned(plane, tmp_path / "trust")
    anchors = [Anchor(tmp_path / name, pin) for name in ("distiller", "gate")]
    plane.student()
    plane.release(1, state=ReleaseState.PACKED)
    assert go_round(plane, table, *anchors)
    if open_before:  # an evaluation is under way when the keys change
        plane.release(2, state=ReleaseState.PACKED, content=b"second")
        with plane.registry.transaction() as session:
            assert publish.propose(session, table.signers["distiller"], trust=anchors[0].trusted)
    for name in replaced:
        await send(plane, table.replace("targets", name, "targets"))
    assert "cloud work" in (await standing(plane))["student"].action
    if fresh_machine:
        anchors = [Anchor(tmp_path / f"new-{name}", pin) for name in ("distiller", "gate")]
    renewed = [go_round(plane, table, *anchors) for _ in range(3)]
    assert renewed[0] is not None
    assert (await standing(plane))["student"].action == ""
    with plane.registry.reading() as session:
        trusted = repository.trusted(session)
    assert trusted.current
    listed = {number for _, number in rules.releases_of(trusted.student)}
    assert listed == ({1, 2} if open_before else {1})
    for anchor in anchors:
        with plane.registry.reading() as session:
            assert anchor.trusted(session) == trusted


async def test_stolen_keys_that_were_replaced_sign_nothing_any_more(plane: Plane, table: Ceremony) -> None:
    plane.student()
    thief = dict(table.signers)
    for name in ("distiller", "gate"):
        await send(plane, table.replace("targets", name, "targets"))
    go_round(plane, table)
    plane.release(1, state=ReleaseState.PACKED)
    with plane.registry.transaction() as session:
        assert publish.propose(session, thief["distiller"]) is not None
    with plane.registry.transaction() as session:
        assert publish.open_proposal(session) is None
        assert not publish.publish(session, plane.cloud.online_signer)
    assert go_round(plane, table) is not None  # withdrawn, and proposed by the right one


async def test_an_anchor_takes_no_root_on_the_registrys_word(plane: Plane, table: Ceremony, tmp_path: Path) -> None:
    anchor = Anchor(tmp_path / "gate", pinned(plane, tmp_path / "trust"))
    evil = Metadata[Root].from_bytes(table.stage("root", Changes()))
    attacker = CryptoSigner.generate_ed25519()
    for role in ("root", "targets"):
        evil.signed.roles[role].keyids.clear()
        evil.signed.add_key(attacker.public_key, role)
    evil.signed.roles["root"].threshold = 1
    content = repository.signed(evil.signed, attacker, table.signers["root-1"])
    with plane.registry.transaction() as session:
        repository.store(session, "root", 2, content, now=now())
    with plane.registry.reading() as session, pytest.raises(EbbflowError) as caught:
        anchor.trusted(session)
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED


async def test_an_anchor_follows_many_roots(plane: Plane, table: Ceremony, tmp_path: Path) -> None:
    anchor = Anchor(tmp_path / "gate", pinned(plane, tmp_path / "trust"))
    for turn in range(12):
        name = keys.ROOTS[turn % 3]
        await send(plane, table.replace("root", name, f"old {name}", name, keys.ROOTS[(turn + 1) % 3]))
    with plane.registry.reading() as session:
        assert anchor.trusted(session).current
    kept = Metadata[Root].from_bytes((tmp_path / "gate" / "root.json").read_bytes())
    assert kept.signed.version == 13


async def test_an_anchor_does_not_go_back(plane: Plane, table: Ceremony, tmp_path: Path) -> None:
    anchor = Anchor(tmp_path / "gate", pinned(plane, tmp_path / "trust"))
    plane.student()
    publish_release(plane, table, 1)
    with plane.registry.reading() as session:
        anchor.trusted(session)
    with plane.registry.transaction() as session:  # somebody who writes to the registry restores an older list
        session.delete(session.get_one(TrustMetadata, ("student", 2)))
    with plane.registry.reading() as session, pytest.raises(EbbflowError, match="not the one that was seen before"):
        anchor.trusted(session)
    restarted = Anchor(tmp_path / "gate", tmp_path / "nowhere")
    with plane.registry.reading() as session, pytest.raises(EbbflowError):
        restarted.trusted(session)


async def test_an_anchor_notices_another_list_of_the_same_version(
    plane: Plane, table: Ceremony, tmp_path: Path
) -> None:
    anchor = Anchor(tmp_path / "gate", pinned(plane, tmp_path / "trust"))
    with plane.registry.reading() as session:
        anchor.trusted(session)
    with plane.registry.transaction() as session:
        row = repository.required(session, "student")
        other = Metadata[Targets].from_bytes(row.content).signed
        other.unrecognized_fields[roles.HIGHEST] = {"faq": 1}
        row.content = repository.signed(other, table.signers["distiller"], table.signers["gate"])
    with plane.registry.reading() as session, pytest.raises(EbbflowError):
        anchor.trusted(session)


def test_an_anchor_without_a_root_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(EbbflowError, match=r"copy trust/root\.json") as caught:
        Anchor(tmp_path / "gate", tmp_path / "trust" / "root.json")
    assert caught.value.reason is Reason.NOT_INITIALISED
    (tmp_path / "root.json").write_text("half")
    with pytest.raises(EbbflowError) as caught:
        Anchor(tmp_path / "gate", tmp_path / "root.json")
    assert caught.value.reason is Reason.FILE_CORRUPT
