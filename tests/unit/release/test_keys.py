"""The files of the embedded default's signing keys."""

import stat
from pathlib import Path

import pytest

from ebbflow.cloud.release import keys
from ebbflow.common.errors import EbbflowError, Reason


def test_every_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    keys.create(folder)
    assert {path.name for path in folder.iterdir()} == {f"{name}.pem" for name in keys.NAMES}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len({keys.load(folder, name).public_key.keyid for name in keys.NAMES}) == len(keys.NAMES)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    keys.create(tmp_path)
    before = (tmp_path / "gate.pem").read_bytes()
    (tmp_path / "root-1.pem").unlink()
    with pytest.raises(EbbflowError) as caught:
        keys.create(tmp_path)
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert (tmp_path / "gate.pem").read_bytes() == before
    assert not (tmp_path / "root-1.pem").exists()


def test_a_set_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".keys.new").mkdir()
    (tmp_path / ".keys.new" / "gate.pem").write_text("half")
    (tmp_path / "keys").mkdir()
    keys.create(tmp_path / "keys")
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
    assert all(keys.load(tmp_path / "keys", name) for name in keys.NAMES)


def test_a_missing_or_damaged_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(EbbflowError, match=r"gate\.pem") as caught:
        keys.load(tmp_path, "gate")
    assert caught.value.reason is Reason.NOT_INITIALISED
    (tmp_path / "gate.pem").write_text("-----BEGIN PRIVATE KEY-----\nnonsense\n")
    with pytest.raises(EbbflowError, match=r"gate\.pem") as caught:
        keys.load(tmp_path, "gate")
    assert caught.value.reason is Reason.FILE_CORRUPT


def test_the_advice_names_every_key(tmp_path: Path) -> None:
    text = keys.advice(tmp_path)
    assert all(f"{name}.pem" in text for name in keys.NAMES)
    assert str(tmp_path) in text
