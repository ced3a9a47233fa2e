"""What is measured of an engine, and the line that compares it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from bench_engine import CONTENDERS, prepare
from speed.report import Figures, summary
from speed.session import Measured, Task, main, measure
from speed.shapes import SHAPES, Shape


class Counting:
    """Counts what it is asked for."""

    def __init__(self, shape: Shape, path: Path, threads: int) -> None:
        self.begun: list[tuple[int, int]] = []
        self.prompts: list[tuple[int, ...]] = []
        self.steps = 0
        self.closed = False
        self.made_of = (shape.name, path, threads)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        self.begun.append((len(prompts), len(prompts[0])))
        self.prompts += [tuple(prompt) for prompt in prompts]

    def next(self) -> None:
        self.steps += 1

    def close(self) -> None:
        self.closed = True


def measured(decode: float, first_ms: float, rss_mb: float = 250.0, weights_bytes: int = 0) -> Measured:
    first = {"16": first_ms / 8, "128": first_ms, "1024": 10 * first_ms}
    return Measured(1.0, first, decode, 4 * decode, 0.1, rss_mb, rss_mb + 50, weights_bytes)


def test_an_engine_runs_every_prompt_once_and_is_loaded_again() -> None:
    made: list[Counting] = []

    def load(shape: Shape, path: Path, threads: int) -> Counting:
        made.append(Counting(shape, path, threads))
        return made[-1]

    found = measure(Task("26m", "/file", 2), load)
    first, second = made
    assert first.made_of == ("26m", Path("/file"), 2)
    assert {(1, 16), (1, 128), (1, 1024), (8, 32)} <= set(first.begun)
    assert len(set(first.prompts)) == len(first.prompts)
    assert all(0 <= token < SHAPES["26m"].vocab_size for prompt in first.prompts for token in prompt)
    assert first.closed
    assert second.closed
    assert second.begun == [(1, 16)]
    assert found.first_token_ms.keys() == {"16", "128", "1024"}
    assert found.rss_mb <= found.peak_mb


def test_a_swap_in_place_needs_no_second_engine(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Counting] = []

    def load(shape: Shape, path: Path, threads: int) -> Counting:
        made.append(Counting(shape, path, threads))
        return made[-1]

    swapped: list[Path] = []
    main(load, lambda _, path: swapped.append(path), json.dumps(vars(Task("26m", "/file", 1, quick=True))))
    assert json.loads(capsys.readouterr().out)["swap_s"] > 0
    assert swapped == [Path("/file")]
    assert len(made) == 1


def test_the_line_compares_medians() -> None:
    ours = [measured(decode, 100, weights_bytes=200_000_000) for decode in (10, 150, 140)]
    theirs = [measured(decode, 300) for decode in (70, 60, 1000)]
    runs = {("0.3b", 1, "ours"): ours, ("0.3b", 1, "llamacpp"): theirs, ("0.3b", 2, "ours"): ours}
    line = summary(Figures(runs, {1: [40.0], 2: [30.0, 35.0, 60.0]}))
    ratios = line["ratios"]
    assert ratios["decode_vs_llamacpp"] == ratios["batch8_vs_llamacpp"] == 2
    assert ratios["prefill_vs_llamacpp"] == 3
    assert ratios["bandwidth_share"] == pytest.approx(140 * 0.2 / 35)
    assert ratios["bandwidth_share_1_thread"] == pytest.approx(140 * 0.2 / 40)
    assert "decode_26m_vs_llamacpp" not in ratios
    assert (line["metrics"]["rss_mb"], line["metrics"]["first_token_ms"]) == (250, 100)
    assert line["rivals"]["llamacpp_decode_tokens_s"] == 70


def test_a_rival_that_cannot_be_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> Path:
        raise OSError("no network")

    contender = CONTENDERS["llamacpp"]
    broken = type(contender)(contender.module, contender.file, refuse)
    fine = type(contender)("speed.ours", lambda _: Path("/file"), lambda: Path("/python"))
    monkeypatch.setattr("bench_engine.CONTENDERS", {"ours": fine, "llamacpp": broken})
    assert prepare(["ours", "llamacpp"], ["26m"]) == ["ours"]
    assert "llamacpp is left out: no network" in capsys.readouterr().err
