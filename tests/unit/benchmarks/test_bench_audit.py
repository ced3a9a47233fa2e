import json

import pytest
from bench_audit import CORRECT, PROMISED, Cell, main, narrow_audit, summary
from broken_builds import HALVED, UNCLIPPED


def cell(bug: str, hits: int, audits: int, runs: int = 50_000) -> Cell:
    made = Cell("votes", 4.0, bug, runs)
    for number in range(audits):
        made.note({"scale": [number < hits], "mu": [False] * 4}, 0.5)
    return made


def test_the_power_is_the_share_of_audits_with_any_failure_and_its_bound_is_lower() -> None:
    found = cell(HALVED[0], 19, 20)
    assert (found.power, found.caught["scale"], found.caught["mu"], found.tests) == (0.95, 19, 0, 100)
    assert 0.7 < found.least_power < 0.95
    assert cell(HALVED[0], 20, 20).least_power == pytest.approx(0.05 ** (1 / 20))
    assert cell(HALVED[0], 0, 20).least_power == 0.0


def test_what_is_promised_is_read_off_audits_of_the_promised_size() -> None:
    cells = [cell(CORRECT[0], 0, 10), cell(HALVED[0], 9, 10), cell(HALVED[0], 10, 10, 200_000)]
    metrics = summary([*cells, cell("cap per bin", 1, 10)], 50_000)["metrics"]
    assert (metrics["least_promised_power"], metrics["false_alarms"], metrics["correct_tests"]) == (0.9, 0, 50)
    assert metrics["power"]["votes/4/cap per bin/50000"] == 0.1


def test_a_small_benchmark_tells_right_builds_from_wrong_ones(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--runs", "1024", "--audits", "1", "--narrow-audits", "0", "--epsilons", "8"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["benchmark"] == "audit"
    assert told["metrics"]["false_alarms"] == 0
    assert told["metrics"]["power"][f"votes/8/{UNCLIPPED[0]}/1024"] == 1.0
    assert {HALVED[0], UNCLIPPED[0]} <= PROMISED


def test_an_audit_run_by_run_counts_every_kind_of_test() -> None:
    failed = narrow_audit("metrics", 8.0, HALVED[1](), 1000)
    assert {test: len(verdicts) for test, verdicts in failed.items()} == {
        "scale": 1,
        "influence": 3,
        "mu": 6,
        "noise": 4,
    }
    assert failed["scale"] == [True]
