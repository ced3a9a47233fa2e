"""What a campaign has done."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from faults.powercut import Record

_PLACES = (
    ("/trust/", "metadata"),
    ("/partial/", "download"),
    ("slots.json", "slot switch"),
    ("/a/", "move into slot"),
    ("/b/", "move into slot"),
    ("agent.db", "agent's records"),
    ("/identity", "identity"),
    ("registry.db", "registry"),
    ("/blobs/", "blobs"),
    ("/work/", "checkpoint"),
)


def place_of(record: Record | None, disk: Path) -> str:
    """Says in a word where on a disk an operation took place."""
    if record is None:
        return "before any file operation"
    path = (record.to or record.path).removeprefix(str(disk))
    return next((word for part, word in _PLACES if part in path), "other files")


@dataclass
class Report:
    """Counts."""

    kills: Counter[str] = field(default_factory=Counter)
    """Kills by operation."""
    power_cuts: int = 0
    lost: int = 0
    """Files torn and names lost in power cuts."""
    disturbances: Counter[str] = field(default_factory=Counter)
    episodes: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    """Kills that came too late: the operation had ended before so many steps."""

    @property
    def total(self) -> int:
        """Kills so far."""
        return self.kills.total()

    def __str__(self) -> str:
        """The table for people."""
        lines = [f"{self.total} kills, {self.power_cuts} of them power cuts ({self.lost} files torn or names lost)"]
        lines += [f"  {count:4d}  {operation}" for operation, count in sorted(self.kills.items())]
        lines += [f"{self.disturbances.total()} other disturbances"]
        lines += [f"  {count:4d}  {name}" for name, count in sorted(self.disturbances.items())]
        lines += [f"episodes: {dict(self.episodes)}; {self.missed} planned kills came too late"]
        return "\n".join(lines)
