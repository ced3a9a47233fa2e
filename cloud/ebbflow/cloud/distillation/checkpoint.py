"""Where an interrupted run goes on: one file, whole or not there, that belongs to exactly one run."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from ebbflow.common.files import atomic, full_disk_named

_log = logging.getLogger(__name__)
_NAME = "checkpoint.pt"


class Checkpoints:
    """The newest checkpoint of one run.

    Every valid checkpoint of a run lies on the same trajectory, so a worker that lost its lease does no harm by
    writing once more.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """Names the place; nothing is read or written yet.

        Args:
            folder: belongs to this run; it is made when needed.
            run: names everything that the run depends on; a checkpoint of another run is not used.
        """
        self._folder = folder
        self._path = folder / _NAME
        self._run = run

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint, durably.

        Raises:
            EbbflowError: DISK_FULL; the checkpoint before stays.
        """
        with full_disk_named(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic(self._path) as file:
                torch.save({"run": self._run, "state": state}, file)

    def load(self) -> dict[str, Any] | None:
        """Returns the newest state, or None if there is none that this run can use.

        A damaged file is left behind: training anew gives the same result, only later.
        """
        try:
            content = torch.load(self._path, weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            _log.warning("checkpoint %s is damaged; the run begins anew", self._path)
            return None
        if not isinstance(content, dict) or content.get("run") != self._run:
            _log.warning("checkpoint %s belongs to another run; this one begins anew", self._path)
            return None
        state: dict[str, Any] = content["state"]
        return state

    def discard(self) -> None:
        """Removes the checkpoint when nobody needs it any more."""
        self._path.unlink(missing_ok=True)
        if self._folder.exists() and not any(self._folder.iterdir()):
            self._folder.rmdir()
