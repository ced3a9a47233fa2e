"""The torch twin of an artefact: a student whose weights are exactly what the codes stand for."""

from pathlib import Path

import torch

from ebbflow.common.codes.artefact import Variant, read_variant
from ebbflow.common.student.model import Student


def load_student(path: Path) -> Student:
    """Loads an artefact of any precision as a float32 student; the reference for the gate and for every engine.

    Raises:
        EbbflowError: FILE_CORRUPT if the artefact is not whole.
    """
    return build_student(read_variant(path))


def build_student(variant: Variant) -> Student:
    """De-quantises a variant tensor by tensor into a float32 student.

    Raises:
        EbbflowError: FILE_CORRUPT if it holds numbers that no code stands for.
    """
    student = Student.empty(variant.config)
    tensors = {name: torch.from_numpy(variant.weight(name)) for name in variant.config.tensor_shapes()}
    student.load_state_dict(tensors, assign=True)
    return student.requires_grad_(False).eval()
