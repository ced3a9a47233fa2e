"""Settings: file, environment, and faults that name the field and never the value."""

import datetime as dt
from contextlib import closing
from pathlib import Path

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.local import ceiling_of, open_store
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.feedback.consent import Consent
from ebbflow.edge.feedback.plans import Ceiling


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('http_listen = "127.0.0.1:1"\nqueued = 5\nprecisions = ["int4"]\n')
    monkeypatch.setenv("EBBFLOW_EDGE_QUEUED", "6")
    settings = AgentSettings.load(path, tmp_path)
    assert (settings.http_listen, settings.queued, settings.precisions) == ("127.0.0.1:1", 6, ("int4",))
    assert settings.state == tmp_path


@pytest.mark.parametrize(
    "line",
    [
        *("queued = 0", 'precisions = ["int2"]', "precisions = []", "nonsense = 1", 'grpc_key = "/key.pem"'),
        *("delta = 2", 'consent = "perhaps"', "lifetime_epsilon = -1"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'api_key = "s3cret"\n{line}\n')
    with pytest.raises(EbbflowError) as caught:
        AgentSettings.load(path)
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert line.split(" ", maxsplit=1)[0] in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("content", [b"queued = ", b"\xff"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(content)
    with pytest.raises(EbbflowError) as caught:
        AgentSettings.load(path)
    assert str(path) in str(caught.value)


def test_the_key_is_not_shown() -> None:
    assert "s3cret" not in repr(AgentSettings(api_key="s3cret"))  # type: ignore[arg-type]


def test_a_limit_and_windows_are_read_with_their_units_and_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(
        'bandwidth_limit = "2MB/s"\ntransfer_windows = ["mon-fri 22:00-06:00"]\ntime_zone = "Europe/Berlin"\n'
    )
    monkeypatch.setenv("EBBFLOW_EDGE_BANDWIDTH_LIMIT", "500kbit/s")
    settings = AgentSettings.load(path)
    assert settings.bandwidth_limit == 62_500
    night = dt.datetime(2026, 11, 23, 21, 30, tzinfo=dt.UTC)  # 22:30 in Berlin, a Monday
    assert settings.windows.is_open(night)
    assert not settings.windows.is_open(night - dt.timedelta(hours=1))
    monkeypatch.delenv("EBBFLOW_EDGE_BANDWIDTH_LIMIT")
    assert (AgentSettings().bandwidth_limit, AgentSettings().windows.windows) == (0, ())


@pytest.mark.parametrize(
    "line",
    [
        'bandwidth_limit = "2MB"',
        "bandwidth_limit = 2000000",
        "bandwidth_limit = true",
        'transfer_windows = ["22-06"]',
        'transfer_windows = "22:00-06:00"',
        'time_zone = "Mars/Olympus"',
    ],
)
def test_a_limit_or_window_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f"{line}\n")
    with pytest.raises(EbbflowError) as caught:
        AgentSettings.load(path)
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert line.split(" ", maxsplit=1)[0] in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "field"),
    [
        ('escalate = ["faq"]', "teacher"),
        ('escalate = ["students/faq"]\nteacher = "cloud.example:8445"', "escalate"),
        ('teacher = "cloud.example"', "teacher"),
        ('teacher = "cloud.example:0"', "teacher"),
        ('teacher = "cloud.example:99999"', "teacher"),
        ("escalate_below = 1.5", "escalate_below"),
        ("escalate_most = 0", "escalate_most"),
        ("escalate_timeout_s = 0", "escalate_timeout_s"),
    ],
)
def test_escalation_needs_students_a_teacher_and_sound_limits(lines: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(lines)
    with pytest.raises(EbbflowError) as caught:
        AgentSettings.load(path)
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert field in str(caught.value)


def test_no_device_escalates_by_itself(tmp_path: Path) -> None:
    assert AgentSettings.load(None, tmp_path).escalate == ()
    path = tmp_path / "agent.toml"
    path.write_text('escalate = ["faq"]\nteacher = "cloud.example:8445"\n')
    assert AgentSettings.load(path).escalate == ("faq",)


def test_what_a_device_gives_away_is_what_its_settings_say(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('epsilon = 2\nwindow_days = 60\nlifetime_epsilon = 5\nconsent = "required"\nadapters = true\n')
    settings = AgentSettings.load(path, tmp_path)
    assert ceiling_of(settings) == Ceiling(2.0, 1e-6, 60, 5.0, adapters=True)
    with closing(open_store(settings)) as store:
        assert store.consent is Consent.REQUIRED


def test_a_device_gives_away_no_adapters_and_no_lifetime_is_set_by_itself() -> None:
    assert ceiling_of(AgentSettings.load(None)) == Ceiling()
    assert not Ceiling().adapters
    assert Ceiling().lifetime_nano == 0


def test_a_lifetime_below_a_window_is_named(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("epsilon = 4\nlifetime_epsilon = 3\n")
    with pytest.raises(EbbflowError) as caught:
        ceiling_of(AgentSettings.load(path))
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert "lifetime_epsilon" in str(caught.value)
