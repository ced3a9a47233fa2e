"""Chooses the cheapest way to a file of weights from what the device has. No IO in here."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from ebbflow.common.codes.delta import FORMAT
from ebbflow.edge.delivery.files import SignedFile

DELTA_FORMATS = frozenset({FORMAT})
"""Formats that this device can apply."""
MOST_BASES = 8
"""How many files one question to the cloud may name."""


class Way(Enum):
    """How a file of weights comes to be on the device."""

    FULL = "full"
    DELTA = "delta"
    DERIVED = "derived"


@dataclass(frozen=True)
class Held:
    """A whole file of weights that is on the device."""

    path: Path
    file: SignedFile
    precision: str
    release: int
    derives: SignedFile | None = None
    """For INT8: the INT4 file that derives from it, as the signed metadata lists it."""
    doomed: bool = False
    """Whether it lies in the slot that is about to be filled: it must be kept elsewhere, and frees no room."""

    @property
    def kept_bytes(self) -> int:
        """Room that it takes beside the two slots."""
        return self.file.size_bytes if self.doomed else 0


@dataclass(frozen=True)
class Offer:
    """A delta that the cloud offers. Nothing in it is trusted."""

    base_sha256: str
    file: SignedFile
    format: str


@dataclass(frozen=True)
class Step:
    """One way to the file, with what it costs."""

    way: Way
    fetch_bytes: int
    """Bytes still to be fetched."""
    disk_bytes: int
    """Bytes that the disk must still have room for, once the slot is emptied."""
    base: Held | None = None
    """What the delta begins from, or the file derives from."""
    offer: Offer | None = None

    @property
    def derives_base(self) -> bool:
        """Whether the delta begins from the INT4 file that is first derived from `base`."""
        return bool(self.offer and self.base and self.offer.base_sha256 != self.base.file.sha256)


@dataclass(frozen=True)
class Wish:
    """What is wanted, and what there is to begin from."""

    file: SignedFile
    precision: str
    release: int
    held: tuple[Held, ...] = ()
    """In order of preference."""
    partial_bytes: Mapping[str, int] = field(default_factory=dict)
    """What has been fetched so far, by SHA-256."""

    def derived(self) -> Step | None:
        """The way that fetches nothing, if there is one."""
        if self.precision != "int4":
            return None
        for held in self.held:
            if held.precision == "int8" and (held.release == self.release or held.derives == self.file):
                return Step(Way.DERIVED, 0, self.file.size_bytes + held.kept_bytes, held)
        return None

    def bases(self) -> list[str]:
        """SHA-256 of the files that a delta may begin from: those of the precision, and what derives into it."""
        return list(self._bases())[:MOST_BASES]

    def steps(self, offers: Iterable[Offer] = (), shunned: Collection[str] = ()) -> list[Step]:
        """All ways, cheapest first. The full file is always among them.

        Args:
            offers: deltas that the cloud offers; those that are of no use are left out.
            shunned: SHA-256 of deltas that did not work out before.
        """
        bases = self._bases()
        found = [
            self._delta(offer, bases[offer.base_sha256])
            for offer in offers
            if offer.base_sha256 in bases and offer.file.sha256 not in shunned and self._useful(offer)
        ]
        order = {sha256: place for place, sha256 in enumerate(bases)}
        found.sort(key=lambda step: (step.fetch_bytes, order[step.offer.base_sha256] if step.offer else 0))
        missing = self._missing(self.file)
        full = Step(Way.FULL, missing, missing)
        derived = self.derived()
        cheaper = [step for step in found if step.fetch_bytes < full.fetch_bytes]
        return [*([derived] if derived else []), *cheaper, full]

    def _bases(self) -> dict[str, Held]:
        """What each possible base is made from. A file that is there comes before one that must be derived."""
        same = {held.file.sha256: held for held in self.held if held.precision == self.precision}
        if self.precision != "int4":
            return same
        derivable = {held.derives.sha256: held for held in self.held if held.precision == "int8" and held.derives}
        return same | {sha256: held for sha256, held in derivable.items() if sha256 not in same}

    def _useful(self, offer: Offer) -> bool:
        return offer.format in DELTA_FORMATS and 0 < offer.file.size_bytes < self.file.size_bytes

    def _delta(self, offer: Offer, base: Held) -> Step:
        missing = self._missing(offer.file)
        disk_bytes = missing + self.file.size_bytes + base.kept_bytes
        if base.derives and base.file.sha256 != offer.base_sha256:
            disk_bytes += base.derives.size_bytes
        return Step(Way.DELTA, missing, disk_bytes, base, offer)

    def _missing(self, file: SignedFile) -> int:
        return max(0, file.size_bytes - self.partial_bytes.get(file.sha256, 0))
