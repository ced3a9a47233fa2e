"""Settings: file, environment, and faults that name the field and never the value."""

from pathlib import Path

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.settings import AgentSettings


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('http_listen = "127.0.0.1:1"\nqueued = 5\nprecisions = ["int4"]\n')
    monkeypatch.setenv("EBBFLOW_EDGE_QUEUED", "6")
    settings = AgentSettings.load(path, tmp_path)
    assert (settings.http_listen, settings.queued, settings.precisions) == ("127.0.0.1:1", 6, ("int4",))
    assert settings.state == tmp_path


@pytest.mark.parametrize(
    "line",
    ["queued = 0", 'precisions = ["int2"]', "precisions = []", "nonsense = 1", 'grpc_key = "/key.pem"', "delta = 2"],
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
