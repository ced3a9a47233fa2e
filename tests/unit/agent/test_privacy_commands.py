"""`ebbflow-edge privacy`: who runs a device sees what leaves it, and decides who takes part."""

import json
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebbflow.edge.feedback.consent import Consent, Words
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.main import app

Run = Callable[..., str]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def privacy(state: Path) -> Run:
    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["privacy", *words, "--state", str(state)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run


def words(state: Path) -> Words:
    with closing(FeedbackStore(state / "agent.db")) as store:
        return store.words()


def test_a_users_word_is_kept_and_can_be_taken_back(state: Path, privacy: Run) -> None:
    assert "does not take part" in privacy("consent", "--user", "ada", "--no")
    assert words(state) == Words(allowed=0, refused=1, paused=0)
    assert "takes part" in privacy("consent", "--user", "ada", "--yes")
    assert words(state) == Words(allowed=1, refused=0, paused=0)


def test_consent_needs_a_word(state: Path) -> None:
    done = CliRunner().invoke(app, ["privacy", "consent", "--user", "ada", "--state", str(state)])
    assert done.exit_code == 2


def test_a_user_is_paused_and_resumed(state: Path, privacy: Run) -> None:
    privacy("pause", "--user", "")
    assert words(state).paused == 1
    privacy("resume", "--user", "")
    assert words(state).paused == 0


def test_a_purge_says_how_much_it_was(state: Path, privacy: Run) -> None:
    with closing(FeedbackStore(state / "agent.db")) as store:
        store.record_interaction("faq", "r", "ada", "p", "a")
    assert privacy("purge", "--user", "ada") == "1 interactions deleted\n"
    assert privacy("purge", "--user", "ada") == "0 interactions deleted\n"
    assert stat.S_IMODE((state / "purged").stat().st_mode) == 0o600


def test_a_device_without_an_identity_shows_what_it_is_set_to(privacy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBBFLOW_EDGE_CONSENT", Consent.REQUIRED.value)
    monkeypatch.setenv("EBBFLOW_EDGE_EPSILON", "2")
    monkeypatch.setenv("EBBFLOW_EDGE_LIFETIME_EPSILON", "6")
    shown = privacy("show")
    assert "Users take part only if they said yes." in shown
    assert "epsilon 2 at delta 1e-06" in shown
    assert "spent; epsilon 6." in shown


def test_plans_are_shown_as_text_and_as_json(privacy: Run) -> None:
    assert "asked nothing" in privacy("plans")
    assert json.loads(privacy("plans", "-o", "json")) == []
