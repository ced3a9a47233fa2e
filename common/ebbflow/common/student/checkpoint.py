"""Reads and writes students as Hugging Face checkpoints: config.json beside model.safetensors, whole or sharded."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named, write_atomic
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load_config(folder: Path) -> StudentConfig:
    """Reads the configuration in a checkpoint's folder.

    Raises:
        EbbflowError: CHECKPOINT_UNREADABLE naming the file or the field.
    """
    return StudentConfig.from_hf(_read_json(folder / CONFIG))


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Student:
    """Loads a dense ERNIE-4.5 checkpoint, whoever saved it.

    Args:
        folder: holds config.json and model.safetensors, or shards with their index.
        dtype: of the weights in memory.

    Raises:
        EbbflowError: CHECKPOINT_UNREADABLE naming the file, field or tensor.
    """
    config = load_config(folder)
    shapes = config.tensor_shapes()
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        _read_weights(path, tensors, dtype)
    _drop_tied_head(tensors, shapes)
    for name in sorted(shapes.keys() ^ tensors.keys()):
        raise _unreadable(folder, f"{'lacks' if name in shapes else 'has the unexpected'} tensor {name[:120]!r}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise _unreadable(folder, f"has {name!r} of shape {tuple(tensors[name].shape)}, not {shape}")
    student = Student.empty(config)
    student.load_state_dict(tensors, assign=True)
    return student.requires_grad_(True)


def save_checkpoint(student: Student, folder: Path) -> None:
    """Writes a student so that transformers loads it as `Ernie4_5ForCausalLM`; makes the folder.

    Raises:
        EbbflowError: DISK_FULL if it does not fit, CONFIG_INVALID if the folder cannot be written to; files of that
            name may then be incomplete.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    dtype = str(student.model.norm.weight.dtype).removeprefix("torch.")
    config = {**student.config.to_hf(), "dtype": dtype}
    try:
        with full_disk_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode(), mode=0o644)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except OSError as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{folder} cannot be written to", path=folder) from error
    except SafetensorError as error:  # of weights that are in order only the writing can fail
        raise EbbflowError(Reason.DISK_FULL, f"no space left for {folder / WEIGHTS}", path=folder) from error


def _unreadable(path: Path, fault: str) -> EbbflowError:
    return EbbflowError(Reason.CHECKPOINT_UNREADABLE, f"{path} {fault}", path=path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, "cannot be read as JSON") from error
    if not isinstance(content, dict):
        raise _unreadable(path, "does not hold a JSON object")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """The one file, or the shards that the index names; never a file outside the folder."""
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise _unreadable(folder / INDEX, "has no weight_map")
    for name in shards.values():
        if Path(name).name != name:
            raise _unreadable(folder / INDEX, f"points outside its folder: {name[:120]!r}")
    return [folder / name for name in sorted(set(shards.values()))]


def _read_weights(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise _unreadable(path, f"holds {name[:120]!r} as {tensor.dtype}, which is quantised")
                tensors[name] = tensor.to(dtype)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, "cannot be read as safetensors") from error


def _drop_tied_head(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Some checkpoints hold the tied head a second time."""
    if "lm_head.weight" in shapes or "lm_head.weight" not in tensors:
        return
    head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if embedding is None or not torch.equal(head, embedding):
        message = "'tie_word_embeddings' is true, but 'lm_head.weight' differs from the embedding"
        raise EbbflowError(Reason.CHECKPOINT_UNREADABLE, message, field="tie_word_embeddings")
