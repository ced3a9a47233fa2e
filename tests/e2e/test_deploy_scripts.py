"""Wrong command lines of the fleet scripts end at once with a sentence that says what to do."""

import runpy
import sys
from pathlib import Path

import pytest
from deploy_world import DEPLOY, run

FLEET = DEPLOY / "fleet" / "fleet.py"
INSTALLER = DEPLOY / "fleet" / "install-agent.sh"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "ebbflow-0.1.0-py3-none-any.whl"
    path.write_bytes(b"not a wheel")
    return path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--wheel FILE"),
        (["--wheel", "/none.whl"], "/none.whl cannot be read"),
        (["--wheel"], "--wheel needs a value"),
        (["--wheels", "x"], "unknown option --wheels"),
        (["--wheel", "WHEEL", "--python", "python9.9"], "install Python 3.11"),
        (["--wheel", "WHEEL", "--extra", "cloud"], "edge or edge-torch"),
        (["--wheel", "WHEEL", "--service", "cron"], "systemd, none or auto"),
        (["--wheel", "WHEEL", "--prefix", "/proc/ebbflow"], "/proc/ebbflow cannot be written"),
    ],
)
def test_the_installer_says_what_is_wrong(words: list[str], told: str, wheel: Path) -> None:
    done = run(["sh", INSTALLER, *(str(wheel) if word == "WHEEL" else word for word in words)])
    assert done.returncode == 1
    assert told in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_a_wheel_that_pip_refuses_is_not_taken_for_installed(wheel: Path, tmp_path: Path) -> None:
    command = ["sh", INSTALLER, "--wheel", wheel, "--prefix", tmp_path / "opt", "--extra", "edge", "--python"]
    for _ in range(2):
        done = run([*command, sys.executable])
        assert done.returncode == 1
        assert "pip could not install the wheel" in done.stderr
    assert not (tmp_path / "opt" / ".installed").exists()


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        ("# nobody\n", "names no host"),
        ("kiosk --name 'kiosk\n", "line 1: No closing quotation"),
        ("kiosk\n-oProxyCommand=evil\n", "line 2: -oProxyCommand=evil is no host"),
    ],
)
def test_a_list_of_hosts_that_makes_no_sense_is_refused(hosts: str, told: str, wheel: Path, tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_text(hosts)
    done = run([sys.executable, FLEET, "--hosts", file, "--wheel", wheel, "--cloud", "localhost:1"])
    assert done.returncode == 2
    assert told in done.stderr


def test_what_a_host_says_cannot_move_the_cursor_and_keeps_its_cure() -> None:
    fleet = runpy.run_path(str(FLEET))
    said = b"Collecting x\n\nerror: the token \x1b[2Jhas expired\ncure: Make a new token.\n"
    assert fleet["problem"](said) == "the token [2Jhas expired cure: Make a new token."
    assert fleet["problem"](b"ssh: connect to host x port 22: Connection refused\r\n").endswith("Connection refused")
    assert fleet["problem"](b"") == "no output"


def test_hosts_may_have_quoted_options_and_comments() -> None:
    parse = runpy.run_path(str(FLEET))["parse_hosts"]
    text = "a@b --name kiosk-1 # the first\n\n# none\nssh://c@d:2222 --state '/a b'\n"
    assert parse(text) == [("a@b", ["--name", "kiosk-1"]), ("ssh://c@d:2222", ["--state", "/a b"])]
