"""Sensitive matrices, which a release keeps in bfloat16 in every precision.

Engines multiply some matrices at once: query, key and value of a layer, its gate and up. Those are kept together or not
at all, so that what they multiply is rounded one way only.
"""

import json
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from ebbflow.common.codes.quantise import can_code
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig

MOST_PATTERNS = 64
MOST_PATTERN_CHARACTERS = 200


def projections(layer: int) -> tuple[tuple[str, ...], ...]:
    """Matrices of a layer by their Hugging Face names, each with those that engines multiply at once with it."""
    prefix = f"model.layers.{layer}."
    return (
        tuple(f"{prefix}self_attn.{letter}_proj.weight" for letter in "qkv"),
        (f"{prefix}self_attn.o_proj.weight",),
        (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"),
        (f"{prefix}mlp.down_proj.weight",),
    )


def coded_matrices(config: StudentConfig, kept_bf16: Collection[str] = ()) -> frozenset[str]:
    """Returns the matrices that are codes in int8 and int4: those whose width allows it and that are not kept."""
    return frozenset(name for name, shape in config.tensor_shapes().items() if can_code(shape)) - frozenset(kept_bf16)


def choose_kept(config: StudentConfig, patterns: Sequence[str]) -> tuple[str, ...]:
    """Returns the matrices that patterns name, with those that are multiplied at once with them, sorted.

    Args:
        config: shape of the student.
        patterns: of Hugging Face names as in a shell, such as "model.layers.0.*" or "lm_head.weight". Vectors, and
            matrices whose width cannot be coded, are bfloat16 anyway and count for nothing.

    Raises:
        EbbflowError: INVALID_REQUEST naming the pattern that no matrix has.
    """
    matrices = [name for name, shape in config.tensor_shapes().items() if len(shape) == 2]  # noqa: PLR2004
    named: set[str] = set()
    for pattern in patterns:
        found = {name for name in matrices if fnmatchcase(name, pattern)}
        if not found:
            message = f"recipe.keep_bf16 has {pattern!r}, which is the name of no matrix such as {matrices[0]!r}"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="recipe.keep_bf16")
        named |= found
    for layer in range(config.num_hidden_layers):
        for names in projections(layer):
            if not named.isdisjoint(names):
                named.update(names)
    return tuple(sorted(named & coded_matrices(config)))


def encode_kept(kept_bf16: Sequence[str]) -> str:
    """Returns names as an artefact's metadata has them; `decode_kept` is the way back."""
    return json.dumps(list(kept_bf16), separators=(",", ":"))


def decode_kept(text: str, config: StudentConfig) -> tuple[str, ...]:
    """Reads names from an artefact's metadata, trusting nothing of them.

    Raises:
        ValueError: they are not what `choose_kept` returns for a student of this shape.
        RecursionError: the text is nested too deeply.
    """
    found = json.loads(text)
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise ValueError("kept")
    names = tuple(found)
    check_kept(names, config)
    return names


def check_kept(kept_bf16: Sequence[str], config: StudentConfig) -> None:
    """Holds that names are sorted, each once, of matrices that could be coded, and with all that belong together.

    Raises:
        ValueError: they are not.
    """
    names = set(kept_bf16)
    together = (group for layer in range(config.num_hidden_layers) for group in projections(layer))
    whole = all(names.isdisjoint(group) or names.issuperset(group) for group in together)
    if list(kept_bf16) != sorted(names) or not names <= coded_matrices(config) or not whole:
        raise ValueError("kept")
