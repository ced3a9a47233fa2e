"""`ebbflow trust`, from a key on a table to a version that the cloud publishes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner

from ebbflow.cloud.release import keys
from ebbflow.cloud.services.cloud import Cloud

Run = Callable[..., Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no terminal."""
    folder = tmp_path / "table"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("EBBFLOW_KEY_SECRET", raising=False)
    return folder


def key_id(home: Path, name: str) -> str:
    return keys.load(home / "keys", name).public_key.keyid[:12]


def key_file(home: Path, name: str) -> str:
    return str(home / "keys" / f"{name}.pem")


@pytest.mark.usefixtures("here")
def test_the_status_shows_every_role_and_what_to_do(run: Run, cloud: Cloud) -> None:
    shown = run("trust", "status")
    assert shown.code == 0
    lines = [line.split() for line in shown.out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["root", "targets", "student", "feedback", "snapshot", "timestamp"]
    cloud.online_signer = CryptoSigner.generate_ed25519()
    answer = run("trust", "status", "-o", "json").json
    actions = {role["role"]: role["action"] for role in answer["roles"]}
    assert "online_key" in actions["timestamp"]
    assert actions["root"] == ""


def test_a_root_key_is_replaced_by_people_who_carry_a_folder(
    run: Run, run_alone: Run, signing_home: Path, here: Path
) -> None:
    made = run_alone("trust", "key", "create", "root-4.pem")
    (here / "root-4.pub.json").write_text(made.out)
    replaced = f"{key_id(signing_home, 'root-1')}=root-4.pub.json"
    assert run("trust", "stage", "root", "--replace-key", replaced).out.strip() == "ceremony/2.root.json"
    inspected = run_alone("trust", "inspect", "ceremony/2.root.json")
    assert inspected.code == 5
    assert f"key {json.loads(made.out)['keyid']} joins role root" in inspected.out
    assert "asks for 2 more" in inspected.out
    # from here on without a network: no context
    signed = run_alone("trust", "sign", "ceremony/2.root.json", "--key", key_file(signing_home, "root-2"))
    assert "1 of 2" in signed.err
    refused = run("trust", "publish", "ceremony/2.root.json")
    assert (refused.code, "asks for 1 more" in refused.err) == (5, True)
    more = ["--key", key_file(signing_home, "root-3"), "--key", "root-4.pem"]
    assert run_alone("trust", "sign", "ceremony/2.root.json", *more).code == 0
    assert run_alone("trust", "inspect", "ceremony/2.root.json").code == 0
    for _ in range(2):
        assert "published ceremony/2.root.json: root 2" in run("trust", "publish", "ceremony/2.root.json").err
    root = run("trust", "status", "-o", "json").json["roles"][0]
    assert root["version"] == "2"
    assert json.loads(made.out)["keyid"] in [key["keyId"] for key in root["keys"]]


def test_targets_change_hands_in_one_sitting(run: Run, run_alone: Run, signing_home: Path, here: Path) -> None:
    (here / "new.pub.json").write_text(run_alone("trust", "key", "create", "new.pem").out)
    assert run("trust", "stage", "root", "--replace-key", f"{key_id(signing_home, 'targets')}=new.pub.json").code == 0
    pair = ["--key", key_file(signing_home, "root-1"), "--key", key_file(signing_home, "root-2")]
    assert run_alone("trust", "sign", "ceremony/2.root.json", *pair).code == 0
    assert run_alone("trust", "stage", "targets", "--offline").out.strip() == "ceremony/2.targets.json"
    assert run_alone("trust", "sign", "ceremony/2.targets.json", "--key", key_file(signing_home, "targets")).code == 5
    assert run_alone("trust", "sign", "ceremony/2.targets.json", "--key", "new.pem").code == 0
    assert run("trust", "publish", "ceremony/2.root.json", "ceremony/2.targets.json").code == 0
    assert [role["action"] for role in run("trust", "status", "-o", "json").json["roles"][:2]] == ["", ""]


def test_a_forgotten_draft_is_not_built_upon(run: Run, here: Path) -> None:
    assert run("trust", "stage", "root").code == 0
    again = run("trust", "stage", "root")
    assert (again.code, "remove it" in again.err) == (5, True)
    (here / "ceremony" / "2.root.json").rename(here / "ceremony" / "3.root.json")
    assert run("trust", "stage", "root").out.strip() == "ceremony/2.root.json"


def test_an_encrypted_key_takes_its_passphrase_from_the_environment(
    run: Run, run_alone: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_alone("trust", "key", "create", "a.pem", "--encrypt").code == 5
    assert not (here / "a.pem").exists()
    monkeypatch.setenv("EBBFLOW_KEY_SECRET", "correct horse")
    made = run_alone("trust", "key", "create", "a.pem", "--encrypt")
    assert run_alone("trust", "key", "show", "a.pem").out == made.out
    monkeypatch.delenv("EBBFLOW_KEY_SECRET")
    locked = run_alone("trust", "key", "show", "a.pem")
    assert (locked.code, "EBBFLOW_KEY_SECRET" in locked.err) == (5, True)
    assert "correct horse" not in made.out + made.err + locked.err


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (("stage", "targets", "--offline"), 3, "stage once without --offline"),
        (("stage", "root", "--add-key", "online"), 3, "--add-key ROLE=KEY"),
        (("stage", "root", "--revoke-key", "gate=aaaaaaaaaaaa"), 3, "there are root, targets, snapshot"),
        (("sign", "nowhere/2.root.json", "--key", "a.pem"), 3, "cannot be read"),
        (("publish", "nowhere/2.root.json"), 3, "cannot be read"),
        (("key", "show", "vault:x"), 5, "supported are file2, awskms"),
        (("key", "create", "nowhere/a.pem"), 3, "is not there"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_be_done_says_what_to_do(run: Run, arguments: tuple[str, ...], code: int, hint: str) -> None:
    outcome = run("trust", *arguments)
    assert (outcome.code, hint in outcome.err) == (code, True), outcome.err
    assert "cure:" in outcome.err


def test_a_file_that_lost_its_folder_says_what_belongs_beside_it(run: Run, run_alone: Run, here: Path) -> None:
    assert run("trust", "stage", "root").code == 0
    (here / "ceremony" / "1.root.json").unlink()
    lost = run_alone("trust", "inspect", "ceremony/2.root.json")
    assert (lost.code, "1.root.json is not there" in lost.err) == (3, True)
