"""Appending past the page cache: every byte once and in order, whatever the file system can do."""

import errno
import fcntl
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.edge.delivery import appender
from ebbflow.edge.delivery.appender import PIECE_BYTES, Appender

DATA = random.Random(1).randbytes(5 * PIECE_BYTES)
lengths = st.integers(0, PIECE_BYTES + 5000) | st.sampled_from([1, 4096, PIECE_BYTES, 2 * PIECE_BYTES])


def append(path: Path, chunks: list[bytes]) -> None:
    with path.open("a+b") as opened:
        writing = Appender(opened, path.stat().st_size)
        for chunk in chunks:
            writing.write(chunk)
        writing.settle()


@settings(max_examples=60, deadline=None)
@given(there=lengths, parts=st.lists(lengths, max_size=5))
def test_a_file_holds_what_was_there_and_what_was_appended(
    there: int, parts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / "partial"
    path.write_bytes(DATA[:there])
    chunks = [DATA[:length] for length in parts]
    append(path, chunks)
    assert path.read_bytes() == DATA[:there] + b"".join(chunks)


def test_whole_pieces_pass_by_the_cache_and_the_ends_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[tuple[bool, int]] = []
    real = os.write

    def watched(descriptor: int, data: memoryview) -> int:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        direct.append((bool(flags & os.O_DIRECT), len(data)))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", watched)
    path = tmp_path / "partial"
    path.write_bytes(b"x" * 10)
    append(path, [DATA[: 3 * PIECE_BYTES]])
    assert direct == [(False, PIECE_BYTES - 10), (True, PIECE_BYTES), (True, PIECE_BYTES), (False, 10)]


@pytest.mark.parametrize("where", ["fcntl", "write"])
def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fcntl, real_write = fcntl.fcntl, os.write

    def no_flag(descriptor: int, command: int, argument: int = 0) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_fcntl(descriptor, command, argument)

    def no_write(descriptor: int, data: memoryview) -> int:
        if real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    if where == "fcntl":
        monkeypatch.setattr(fcntl, "fcntl", no_flag)
    else:
        monkeypatch.setattr(os, "write", no_write)
    append(tmp_path / "partial", [DATA])
    assert (tmp_path / "partial").read_bytes() == DATA


def test_short_writes_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: max(1, len(data) // 3)]))
    append(tmp_path / "partial", [DATA[: 2 * PIECE_BYTES + 7]])
    assert (tmp_path / "partial").read_bytes() == DATA[: 2 * PIECE_BYTES + 7]


def test_what_trickles_in_is_in_the_file_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appender, "MOST_HELD_S", 0.0)
    path = tmp_path / "partial"
    with path.open("a+b") as opened:
        writing = Appender(opened, 0)
        writing.write(b"slow")
        assert path.read_bytes() == b"slow"
        writing.write(b"ly")
        assert path.read_bytes() == b"slowly"
