import errno
from pathlib import Path

import pytest
import torch

from ebbflow.cloud.distillation.checkpoint import Checkpoints
from ebbflow.common.errors import EbbflowError, Reason


def test_the_newest_state_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", "a")
    assert checkpoints.load() is None
    for step in (1, 2):
        checkpoints.save({"step": step, "student": {"w": torch.full((2,), step)}})
    state = checkpoints.load()
    assert state is not None
    assert (state["step"], state["student"]["w"].tolist()) == (2, [2, 2])


def test_a_state_of_another_run_is_not_used(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "a").save({"step": 1})
    assert Checkpoints(tmp_path, "b").load() is None


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_a_damaged_file_is_not_used(keep: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a")
    checkpoints.save({"step": 1, "student": {"w": torch.zeros(100)}})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    assert checkpoints.load() is None


def test_a_full_disk_is_named_and_the_state_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, "a")
    checkpoints.save({"step": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EbbflowError) as caught:
        checkpoints.save({"step": 2})
    monkeypatch.undo()
    assert caught.value.reason is Reason.DISK_FULL
    assert checkpoints.load() == {"step": 1}


def test_discarding_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", "a")
    checkpoints.save({"step": 1})
    checkpoints.discard()
    checkpoints.discard()
    assert list(tmp_path.iterdir()) == []
