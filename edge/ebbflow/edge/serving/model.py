"""A release that answers on this device."""

from dataclasses import dataclass

from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.engine.base import Engine


@dataclass(frozen=True, eq=False)
class Model:
    """A release with its engine. Two of the same release are different models; compare with `is`."""

    student: str
    """Such as "students/faq"."""
    release: str
    """Such as "students/faq/releases/3"."""
    engine: Engine
    tokenizer: Tokenizer
    variants: frozenset[str] = frozenset()
    """Precisions whose quality the release's gate has measured."""
