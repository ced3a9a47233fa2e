"""Takes back from a folder what was never synced, as a power cut does. Reads the journal that shim.c writes.

What POSIX leaves open is drawn at random: of the bytes written to a file since its last sync any may be on the disk or
not, and of the names changed in a folder since its last sync any last ones may be lost. As on the usual file systems, a
sync of a file also keeps the file's own name and the folders that lead to it.
"""

import enum
import os
import random
import shutil
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_HEAD = struct.Struct("=IIQQQQIIII")
SECTOR_BYTES = 512


class Kind(enum.IntEnum):
    """What was done; the numbers are those of shim.c."""

    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    SYNC_FAILED = 5
    RENAME = 6
    UNLINK = 7
    LINK = 8
    MKDIR = 9
    RMDIR = 10


@dataclass(frozen=True)
class Record:
    """One operation."""

    kind: Kind
    inode: int
    offset: int
    length: int
    old_size: int
    path: str
    to: str
    shadow: str
    """Where the file that lost its name is still found."""
    data: bytes
    """Bytes that were replaced."""

    @property
    def folder(self) -> str:
        """The folder whose sync makes the name durable."""
        return os.path.dirname(self.to or self.path)  # noqa: PTH120 - a text like the others

    def says(self, folder: Path) -> str:
        """What was done, for people."""
        return f"{self.kind.name.lower()} {os.path.relpath(self.to or self.path, folder)}"


def read(journal: Path) -> Iterator[Record]:
    """Yields the operations; a record that was cut off at the end is none."""
    content, at = journal.read_bytes() if journal.exists() else b"", 0
    while at + _HEAD.size <= len(content):
        kind, _, inode, offset, length, old_size, *sizes = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        parts = []
        for size in sizes:
            parts.append(content[at : at + size])
            at += size
        if at > len(content):
            return
        path, to, shadow = (part.decode() for part in parts[:3])
        yield Record(Kind(kind), inode, offset, length, old_size, path, to, shadow, parts[3])


@dataclass
class Unsynced:
    """What a power cut could still take back."""

    writes: dict[int, list[Record]] = field(default_factory=lambda: defaultdict(list))
    """By inode, oldest first."""
    names: list[Record] = field(default_factory=list)
    """Oldest first."""
    doomed: set[int] = field(default_factory=set)
    """Writes, by their place in memory, that a failed sync has given up: Linux never tries those again."""

    @classmethod
    def of(cls, records: Iterator[Record]) -> "Unsynced":
        """Follows the journal."""
        found = cls()
        inodes: dict[str, int] = {}
        for record in records:
            found._add(record, inodes)
        return found

    def _add(self, record: Record, inodes: dict[str, int]) -> None:
        match record.kind:
            case Kind.WRITE | Kind.TRUNCATE:
                self.writes[record.inode].append(record)
            case Kind.SYNC:
                self._sync(record.inode)
                self.names = [name for name in self.names if not _kept_by(name, record)]
            case Kind.SYNC_FAILED:
                self.doomed |= {id(write) for write in self.writes.get(record.inode, ())}
            case Kind.CREATE:
                self.writes.pop(record.inode, None)
                self.names.append(record)
            case _:
                self.names.append(record)

    def _sync(self, inode: int) -> None:
        """Drops what is on the disk now: all but the doomed writes that nobody has written over."""
        writes = self.writes.pop(inode, [])
        good = [write for write in writes if id(write) not in self.doomed]
        if left := [write for write in writes if self._is_lost(write, good)]:
            self.writes[inode] = left

    def _is_lost(self, write: Record, good: list[Record]) -> bool:
        return id(write) in self.doomed and write.kind is Kind.WRITE and not _covered(write, good)


def _covered(write: Record, others: list[Record]) -> bool:
    """Whether another write touches the same bytes."""
    end = write.offset + write.length
    return any(other.offset < end and write.offset < other.offset + other.length for other in others)


def _kept_by(name: Record, sync: Record) -> bool:
    """Whether a sync makes a change of names durable."""
    if name.folder == sync.path:
        return True
    if name.kind is Kind.CREATE:
        return name.inode == sync.inode
    return name.kind is Kind.MKDIR and sync.path.startswith(f"{name.path}/")


def cut(folder: Path, journal: Path, chance: random.Random) -> list[str]:
    """Makes the folder what it could be after a power cut. All processes that wrote there must have ended.

    Returns:
        What was lost, for people.
    """
    unsynced = Unsynced.of(read(journal))
    said = _tear_files(folder, unsynced.writes, chance)
    return said + _lose_names(folder, unsynced.names, chance)


def _tear_files(folder: Path, writes: dict[int, list[Record]], chance: random.Random) -> list[str]:
    where = {path.lstat().st_ino: path for path in sorted(folder.rglob("*")) if path.is_file()}
    said = []
    for inode, records in sorted(writes.items()):
        if inode not in where or not records:
            continue
        style = chance.choice(("keep", "lose", "prefix", "scatter"))
        if style == "keep":
            continue
        said.append(f"{style} {len(records)} writes of {where[inode].relative_to(folder)}")
        _tear(where[inode], records, style, chance)
    return said


def _tear(path: Path, records: list[Record], style: str, chance: random.Random) -> None:
    """Reverts writes of one file, the last one first."""
    first = 0 if style != "prefix" else chance.randrange(len(records))
    with path.open("r+b") as file:
        for index in range(len(records) - 1, first - 1, -1):
            record = records[index]
            if style == "scatter" and chance.random() < 1 / 2:
                continue
            torn = style == "prefix" and index == first
            sectors = max(1, record.length // SECTOR_BYTES)
            _revert(file.fileno(), record, chance.randrange(sectors) * SECTOR_BYTES if torn else 0, style)


def _revert(descriptor: int, record: Record, kept_bytes: int, style: str) -> None:
    size = os.fstat(descriptor).st_size
    if record.kind is Kind.TRUNCATE:
        os.pwrite(descriptor, record.data, record.offset)
        os.ftruncate(descriptor, max(size, record.old_size))
        return
    os.pwrite(descriptor, record.data[kept_bytes:], record.offset + kept_bytes)
    grown_from, end = max(record.old_size, record.offset + kept_bytes), record.offset + record.length
    if grown_from >= end:
        return
    if style == "scatter" or size > end:
        os.pwrite(descriptor, bytes(min(end, size) - grown_from) if size > grown_from else b"", grown_from)
    else:
        os.ftruncate(descriptor, grown_from)


def _lose_names(folder: Path, names: list[Record], chance: random.Random) -> list[str]:
    by_folder: dict[str, list[Record]] = defaultdict(list)
    for record in names:
        by_folder[record.folder].append(record)
    lost = set()
    for records in by_folder.values():
        first = chance.choice((0, len(records), chance.randint(0, len(records))))
        lost |= {id(record) for record in records[first:]}
    undone = [record for record in reversed(names) if id(record) in lost]
    for record in undone:
        _undo(record)
    return [f"lose {record.says(folder)}" for record in undone]


def _undo(record: Record) -> None:
    path, to = Path(record.path), Path(record.to)
    match record.kind:
        case Kind.CREATE | Kind.LINK:
            path.unlink(missing_ok=True)
        case Kind.MKDIR:
            shutil.rmtree(path, ignore_errors=True)
        case Kind.RMDIR if path.parent.is_dir():
            path.mkdir(exist_ok=True)
        case Kind.RENAME if os.path.lexists(to) and path.parent.is_dir():
            to.rename(path)
            _restore(record.shadow, to)
        case Kind.UNLINK:
            _restore(record.shadow, path)
        case _:
            pass  # what it stood in is gone


def _restore(shadow: str, path: Path) -> None:
    if shadow and path.parent.is_dir() and not os.path.lexists(path):
        os.link(shadow, path, follow_symlinks=False)
