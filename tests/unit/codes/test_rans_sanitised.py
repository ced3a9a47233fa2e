"""The coder in C under AddressSanitizer and UndefinedBehaviorSanitizer: thousands of hostile payloads and tables."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ebbflow.common.codes import rans
from ebbflow.common.codes.compiled import LIBRARY
from ebbflow.common.codes.rans import NumpyCoder

CASES = 20_000
UInt8 = npt.NDArray[np.uint8]


def case(kind: int, lanes: int, symbols: int, shares: rans.UInt16, content: bytes) -> bytes:
    return np.array([kind, lanes, symbols, len(content)], "<i4").tobytes() + shares.astype("<u2").tobytes() + content


def damaged(random: np.random.Generator, payload: bytes) -> bytes:
    changed = bytearray(payload)
    for _ in range(int(random.integers(0, 5))):
        if changed:
            changed[int(random.integers(len(changed)))] = int(random.integers(256))
    if random.random() < 0.3:
        changed = changed[: int(random.integers(len(changed) + 1))]
    if random.random() < 0.2:
        changed += random.bytes(int(random.integers(40)))
    return bytes(changed)


def cases(random: np.random.Generator) -> list[bytes]:
    """Sound and damaged payloads, with sound and unsound tables."""
    coder = NumpyCoder()
    found: list[bytes] = []
    while len(found) < CASES:
        symbols = np.minimum(random.geometric(random.uniform(0.01, 0.9), int(random.integers(2, 900))), 255)
        symbols = symbols.astype(np.uint8)
        symbols[0] = 0
        shares = rans.normalise(coder.count(symbols))
        lanes = rans.lanes_of(symbols.size)
        (payload,) = coder.encode([(symbols, shares)])
        found.append(case(1, lanes, symbols.size, shares, symbols.tobytes()))
        for _ in range(60):
            table = shares.copy()
            if random.random() < 0.2:
                table[int(random.integers(256))] ^= int(random.integers(1 << 16))
            other = lanes if random.random() < 0.8 else int(random.integers(-1, 70))
            length = symbols.size if random.random() < 0.7 else int(random.integers(0, 1200))
            found.append(case(0, other, length, table, damaged(random, payload)))
            found.append(case(1, other, symbols.size, table, symbols.tobytes()))
    return found


@pytest.mark.slow
def test_no_payload_makes_the_coder_step_out_of_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rans, "_LANE_SYMBOLS", 16)
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    assert compiler, "this test needs a C compiler"
    program, content = tmp_path / "fuzz", tmp_path / "cases"
    sources = [str(LIBRARY.with_name("rans.c")), str(Path(__file__).with_name("fuzz_rans.c"))]
    options = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
    sanitisers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *options, *sanitisers, "-o", str(program), *sources], check=True)
    made = cases(np.random.default_rng(7))
    content.write_bytes(b"".join(made))
    done = subprocess.run([str(program), str(content)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tried, refused = map(int, done.stdout.split())
    assert tried == len(made)
    assert tried / 5 < refused < tried
