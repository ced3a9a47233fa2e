"""The demo's report: the keys that programs rely on, and a table with the same figures."""

import json
from pathlib import Path

import pytest

from demo.report import AgentReport, Report


@pytest.fixture
def report() -> Report:
    agents = [
        AgentReport(agent=f"kiosk-{n}", epsilon_spent=1.87, epsilon_left=2.9, batch_bytes=300, fetched_bytes=10_000)
        for n in (1, 2, 3)
    ]
    return Report(
        seed=0,
        bits_per_byte={"first": 2.4, "control": 2.2, "feedback": 2.1, "no_privacy": 2.09},
        epsilon=4.0,
        delta=1e-6,
        epsilon_spent=1.87,
        agents=agents,
        users=180,
        requests=720,
        accepted_share=0.25,
        batches_accepted=3,
        informative=True,
        bytes_sent=900,
        bytes_fetched=30_000,
        demand={"web": 1.0},
        mixture={"web": 1.0},
        seconds={"teacher": 50.0, "total": 200.0},
    )


def test_report_json_has_the_promised_keys(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert {"control", "feedback", "no_privacy"} <= set(read["bits_per_byte"])
    assert {"epsilon_spent", "agents", "batches_accepted", "bytes_sent", "seconds"} <= set(read)
    assert read["gain"] == pytest.approx(1 - 2.1 / 2.2)


def test_the_table_shows_every_figure(report: Report) -> None:
    text = report.text()
    for words in ("2.200", "2.100   -4.5 %", "2.090", "kiosk-2", "1.87", "2.90", "900", "30,000", "3 of 3", "50.0"):
        assert words in text
