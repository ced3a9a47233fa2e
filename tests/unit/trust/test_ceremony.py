"""Ceremonies: what may be staged, signed and published."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Metadata, Root, TargetFile, Targets
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from ebbflow.cloud.release import keys, repository
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import ceremony, folder, roles
from ebbflow.common.trust.ceremony import Changes, Draft

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
LATER = NOW + dt.timedelta(days=300)
SIGNERS = {name: CryptoSigner.generate_ed25519() for name in (*keys.NAMES, "new-1", "new-2", "stranger")}
PUBLIC: dict[str, Key] = {name: signer.public_key for name, signer in SIGNERS.items()}


def first_root() -> Metadata[Root]:
    made = repository._first_root(PUBLIC, NOW)
    return Metadata[Root].from_bytes(repository.signed(made, *(SIGNERS[name] for name in keys.ROOTS)))


def first_targets() -> Metadata[Targets]:
    return Metadata[Targets].from_bytes(repository.signed(repository._first_targets(PUBLIC, NOW), SIGNERS["targets"]))


def key_id(name: str) -> str:
    return PUBLIC[name].keyid


def root_draft(changes: Changes, *names: str, base: Metadata[Root] | None = None) -> Draft:
    base = base or first_root()
    draft = Draft(ceremony.read(ceremony.stage(base, changes, LATER), "it"), base)
    for name in names:
        draft.sign(SIGNERS[name])
    return draft


def targets_draft(changes: Changes, *names: str) -> Draft:
    base = first_targets()
    draft = Draft(ceremony.read(ceremony.stage(base, changes, LATER), "it"), first_root(), base)
    for name in names:
        draft.sign(SIGNERS[name])
    return draft


def problem(draft: Draft) -> str:
    with pytest.raises(EbbflowError) as caught:
        draft.check(LATER)
    assert caught.value.reason is Reason.METADATA_REFUSED
    return str(caught.value)


NOTHING = Changes()
NEW_ROOT_KEY = Changes(replace=[(key_id("root-1")[:12], PUBLIC["new-1"])])


@pytest.mark.parametrize(
    ("changes", "signed_by"),
    [
        (NOTHING, ("root-1", "root-3")),
        (NEW_ROOT_KEY, ("root-2", "root-3")),
        (Changes(add=[("root", PUBLIC["new-1"])], threshold=3), ("root-1", "root-2", "new-1")),
        (Changes(replace=[(key_id("online"), PUBLIC["new-1"])]), ("root-1", "root-2")),
        (Changes(add=[("online", PUBLIC["new-1"])]), ("root-1", "root-2")),
        (Changes(replace=[(key_id("targets"), PUBLIC["new-1"])]), ("root-1", "root-2")),
    ],
)
def test_what_enough_old_and_new_keys_have_signed_may_be_published(
    changes: Changes, signed_by: tuple[str, ...]
) -> None:
    draft = root_draft(changes, *signed_by)
    draft.check(LATER)
    assert draft.proposed.signed.version == 2
    assert draft.proposed.signed.expires == LATER + roles.LIFETIMES["root"]


@pytest.mark.parametrize(
    ("changes", "signed_by", "missing"),
    [
        (NOTHING, (), "2 more"),
        (NOTHING, ("root-2",), "1 more"),
        (NEW_ROOT_KEY, ("root-1", "new-1"), "root 1, which is published asks for 1 more"),
        (NEW_ROOT_KEY, ("root-1", "root-2"), "root 2 itself asks for 1 more"),
        (Changes(add=[("root", PUBLIC["new-1"])], threshold=3), ("root-1", "root-2"), "root 2 itself asks for 1 more"),
    ],
)
def test_a_root_that_lacks_signatures_of_either_side_says_whose(
    changes: Changes, signed_by: tuple[str, ...], missing: str
) -> None:
    draft = root_draft(changes, *signed_by)
    assert missing in problem(draft)


@pytest.mark.parametrize("name", ["online", "gate", "stranger", "targets"])
def test_only_keys_that_have_a_say_sign(name: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        root_draft(NOTHING, name)
    assert caught.value.reason is Reason.METADATA_REFUSED
    assert ceremony.short(key_id("root-1")) in str(caught.value)


def test_the_same_key_twice_counts_once() -> None:
    draft = root_draft(NOTHING, "root-1", "root-1")
    assert [quorum.missing for quorum in draft.quorums] == [1, 1]


def test_a_signature_does_not_outlive_a_change_of_what_it_signs() -> None:
    draft = root_draft(NOTHING, "root-1", "root-2")
    draft.proposed.signed.expires += dt.timedelta(days=1)
    assert "2 more" in problem(Draft(draft.proposed, draft.root))


def test_root_shrinks_to_no_fewer_than_two_signatures() -> None:
    assert "at least 2" in problem(root_draft(Changes(threshold=1), "root-1", "root-2"))


def test_a_role_needs_its_keys() -> None:
    changes = Changes(revoke=[("root", key_id(name)) for name in ("root-1", "root-2")])
    assert "root has fewer keys" in problem(root_draft(changes, "root-1", "root-2"))
    assert "snapshot has fewer keys" in problem(
        root_draft(Changes(revoke=[("online", key_id("online"))]), "root-1", "root-2")
    )


def test_versions_follow_one_another_and_do_not_expire_at_once() -> None:
    draft = root_draft(NOTHING, "root-1", "root-2")
    assert "2 is published" in problem(Draft(draft.proposed, draft.proposed))  # type: ignore[arg-type]
    assert "expired" in problem(root_draft(Changes(lifetime=dt.timedelta(0)), "root-1", "root-2"))
    assert "two years" in problem(root_draft(Changes(lifetime=dt.timedelta(days=999)), "root-1", "root-2"))


def test_a_new_gate_key_takes_the_place_of_the_old_one_and_nothing_else_changes() -> None:
    draft = targets_draft(Changes(replace=[(key_id("gate")[:8], PUBLIC["new-1"])]), "targets")
    draft.check(LATER)
    assert [line for line in draft.changes() if "expires" not in line] == [
        f"key {key_id('new-1')} joins role student",
        f"key {key_id('gate')} leaves role student",
    ]
    assert f"student needs 2 of 2 keys: {key_id('distiller')}, {key_id('new-1')}" in draft.afterwards()


def drop_a_role(targets: Targets) -> None:
    assert targets.delegations
    assert targets.delegations.roles
    del targets.delegations.roles["feedback"]


def widen_the_paths(targets: Targets) -> None:
    targets.get_delegated_role("student").paths = ["*"]  # type: ignore[attr-defined]


def ask_for_one_signature(targets: Targets) -> None:
    targets.get_delegated_role("student").threshold = 1


def ask_for_two_plans(targets: Targets) -> None:
    targets.get_delegated_role("feedback").threshold = 2
    targets.add_key(PUBLIC["new-1"], "feedback")


def invite_a_role(targets: Targets) -> None:
    assert targets.delegations
    assert targets.delegations.roles
    targets.delegations.roles["other"] = DelegatedRole("other", [], 1, True, ["student/*/*"])


def list_a_file(targets: Targets) -> None:
    targets.targets["student/faq/1.int8.safetensors"] = TargetFile(1, {"sha256": "e" * 64}, "x")


@pytest.mark.parametrize(
    "abuse", [drop_a_role, widen_the_paths, ask_for_one_signature, ask_for_two_plans, invite_a_role, list_a_file]
)
def test_targets_keep_their_delegations(abuse: Callable[[Targets], None]) -> None:
    staged = ceremony.read(ceremony.stage(first_targets(), NOTHING, LATER), "it")
    assert isinstance(staged.signed, Targets)
    abuse(staged.signed)
    draft = Draft(staged, first_root(), first_targets())
    draft.sign(SIGNERS["targets"])
    problem(draft)


@pytest.mark.parametrize(
    "changes",
    [
        Changes(add=[("student", PUBLIC["new-1"])]),
        Changes(revoke=[("root", "ffffffffffff")]),
        Changes(revoke=[("root", key_id("root-1")[:4])]),
        Changes(revoke=[("root", "")]),
        Changes(replace=[(key_id("gate"), PUBLIC["new-1"])]),
    ],
)
def test_what_is_not_in_the_file_cannot_be_changed(changes: Changes) -> None:
    with pytest.raises(EbbflowError) as caught:
        ceremony.stage(first_root(), changes, LATER)
    assert caught.value.reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"signed": {"_type": "root"}, "signatures": []}'])
def test_what_is_no_metadata_is_refused(data: bytes) -> None:
    with pytest.raises(EbbflowError) as caught:
        ceremony.read(data, "it")
    assert caught.value.reason is Reason.METADATA_REFUSED


NAMES = ["root-1", "root-2", "root-3", "new-1", "new-2"]


@given(
    rounds=st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.sampled_from(NAMES),
            st.sampled_from([None, 2, 3]),
            st.sets(st.sampled_from(NAMES)),
        ),
        max_size=6,
    )
)
def test_whatever_is_published_a_device_follows_and_what_is_refused_it_refuses(
    rounds: list[tuple[str, str, int | None, set[str]]],
) -> None:
    root = first_root()
    device = TrustedMetadataSet(root.to_bytes(), EnvelopeType.METADATA)
    for old, new, threshold, signed_by in rounds:
        changes = Changes(replace=[(key_id(old), PUBLIC[new])], threshold=threshold)
        try:
            staged = ceremony.stage(root, changes, LATER)
        except EbbflowError:
            continue
        draft = Draft(ceremony.read(staged, "it"), root)
        for name in sorted(signed_by):
            try:
                draft.sign(SIGNERS[name])
            except EbbflowError as error:
                assert error.reason is Reason.METADATA_REFUSED  # noqa: PT017
        accepted = not draft.faults(LATER) and not draft.unsigned()
        content = draft.proposed.to_bytes()
        if accepted:
            device.update_root(content)
            root = Metadata[Root].from_bytes(content)
        elif draft.unsigned():
            with pytest.raises((RepositoryError, ValueError)):
                device.update_root(content)


def test_a_folder_holds_a_ceremony_together(tmp_path: Path) -> None:
    folder.save(tmp_path, "root", first_root().to_bytes())
    folder.save(tmp_path, "targets", first_targets().to_bytes())
    root = ceremony.stage(first_root(), Changes(replace=[(key_id("targets"), PUBLIC["new-1"])]), LATER)
    folder.save(tmp_path, "root", root, replace=False)
    path = folder.save(tmp_path, "targets", ceremony.stage(first_targets(), NOTHING, LATER), replace=False)
    assert folder.newest(tmp_path, "targets") == path == tmp_path / "2.targets.json"
    draft = folder.draft(path)
    draft.sign(SIGNERS["new-1"])  # the staged root has given it the say
    assert not draft.unsigned()
    with pytest.raises(EbbflowError) as caught:
        folder.save(tmp_path, "root", root, replace=False)
    assert caught.value.reason is Reason.ALREADY_EXISTS
    (tmp_path / "1.root.json").unlink()
    with pytest.raises(EbbflowError, match=r"1\.root\.json"):
        folder.draft(tmp_path / "2.root.json")
